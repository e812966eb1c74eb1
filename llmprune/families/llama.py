"""Llama 1, 2 and 3.x, and all that share their code (Vicuna, SmolLM, …)."""

from llmprune.families.base import Family, RMSNorm, Role

LLAMA = Family(
    name="llama",
    description="Llama 1, 2, 3.x: RMS norms, rotary positions, gated MLP, grouped queries, tied or untied embeddings",
    model_types=("llama",),
    outer={
        "model.embed_tokens": Role.EMBEDDING,
        "model.norm": Role.FINAL_NORM,
        "lm_head": Role.HEAD,
    },
    blocks="model.layers",
    block={
        "input_layernorm": Role.NORM,
        "self_attn.q_proj": Role.QUERY,
        "self_attn.k_proj": Role.KEY_VALUE,
        "self_attn.v_proj": Role.KEY_VALUE,
        "self_attn.o_proj": Role.ATTENTION_OUT,
        "post_attention_layernorm": Role.NORM,
        "mlp.gate_proj": Role.MLP_IN,
        "mlp.up_proj": Role.MLP_IN,
        "mlp.down_proj": Role.MLP_OUT,
    },
    norm=RMSNorm(epsilon="variance_epsilon"),
    fields={
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "intermediate": "intermediate_size",
    },
)
