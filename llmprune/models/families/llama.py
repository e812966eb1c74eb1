"""Llama and families with its layout: RMS norms, rotary positions, gated MLP, grouped queries."""

from dataclasses import replace

from llmprune.models.families.base import Family, Norm
from llmprune.models.families.roles_and_axes import Role

LLAMA = Family(
    name="llama",
    description="Llama 1, 2, 3.x and all that share their code (Vicuna, SmolLM, …), tied or untied embeddings",
    model_types=("llama",),
    outer={
        "model.embed_tokens": Role.EMBEDDING,
        "model.norm": Role.FINAL_NORM,
        "lm_head": Role.OUTPUT,
    },
    blocks="model.layers",
    block={
        "input_layernorm": Role.ATTENTION_NORM,
        "self_attn.q_proj": Role.QUERY,
        "self_attn.k_proj": Role.KEY_VALUE,
        "self_attn.v_proj": Role.KEY_VALUE,
        "self_attn.o_proj": Role.ATTENTION_OUT,
        "post_attention_layernorm": Role.MLP_NORM,
        "mlp.gate_proj": Role.MLP_IN,
        "mlp.up_proj": Role.MLP_IN,
        "mlp.down_proj": Role.MLP_OUT,
    },
    norm=Norm(epsilon="variance_epsilon"),
    fields={
        "layers": "num_hidden_layers",
        "vocabulary": "vocab_size",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "intermediate": "intermediate_size",
    },
    whole_heads=True,
    buffers=("self_attn.rotary_emb.inv_freq",),
)

MISTRAL = replace(
    LLAMA,
    name="mistral",
    description="Mistral 7B and its kin: as Llama, with sliding-window attention",
    model_types=("mistral",),
    whole_heads=False,
)

QWEN2 = replace(
    LLAMA,
    name="qwen2",
    description="Qwen1.5, Qwen2 and Qwen2.5: as Llama, with biases on queries, keys and values",
    model_types=("qwen2",),
    whole_heads=False,
    per_block=("layer_types",),
)

QWEN3 = replace(
    QWEN2,
    name="qwen3",
    description="Qwen3 (dense): as Llama, with a norm of every query and key",
    model_types=("qwen3",),
    block={**LLAMA.block, "self_attn.q_norm": Role.HEAD_NORM, "self_attn.k_norm": Role.HEAD_NORM},
)

PHI3 = replace(
    LLAMA,
    name="phi3",
    description="Phi-3 and Phi-4: as Llama, with fused projections",
    model_types=("phi3",),
    whole_heads=False,
    block={
        "input_layernorm": Role.ATTENTION_NORM,
        "self_attn.qkv_proj": Role.QUERY_KEY_VALUE,
        "self_attn.o_proj": Role.ATTENTION_OUT,
        "post_attention_layernorm": Role.MLP_NORM,
        "mlp.gate_up_proj": Role.MLP_GATE_UP,
        "mlp.down_proj": Role.MLP_OUT,
    },
    derived_head_size=lambda config: config.rope_scaling is not None,  # its length is checked with hidden / heads
)

OLMO2 = replace(
    LLAMA,
    name="olmo2",
    description="OLMo 2: norms after attention and MLP in place of before, and norms over all queries and all keys",
    model_types=("olmo2",),
    whole_heads=False,
    block={
        "self_attn.q_proj": Role.QUERY,
        "self_attn.k_proj": Role.KEY_VALUE,
        "self_attn.v_proj": Role.KEY_VALUE,
        "self_attn.q_norm": Role.QUERY_NORM,
        "self_attn.k_norm": Role.KEY_NORM,
        "self_attn.o_proj": Role.ATTENTION_OUT_TO_NORM,
        "post_attention_layernorm": Role.ATTENTION_POST_NORM,
        "mlp.gate_proj": Role.MLP_IN,
        "mlp.up_proj": Role.MLP_IN,
        "mlp.down_proj": Role.MLP_OUT_TO_NORM,
        "post_feedforward_layernorm": Role.MLP_POST_NORM,
    },
)
