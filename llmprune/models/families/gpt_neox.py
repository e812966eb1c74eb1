"""GPT-NeoX and Pythia: attention and MLP in parallel, LayerNorm, and each head's query, key and value in one matrix."""

from llmprune.models.families.base import Family, Norm
from llmprune.models.families.roles_and_axes import Role

GPT_NEOX = Family(
    name="gpt_neox",
    description="GPT-NeoX and Pythia: LayerNorm, biases, attention and MLP side by side, head size hidden / heads",
    model_types=("gpt_neox",),
    outer={
        "gpt_neox.embed_in": Role.EMBEDDING,
        "gpt_neox.final_layer_norm": Role.FINAL_NORM,
        "embed_out": Role.OUTPUT,
    },
    blocks="gpt_neox.layers",
    block={
        "input_layernorm": Role.ATTENTION_NORM,
        "attention.query_key_value": Role.HEADS_QUERY_KEY_VALUE,
        "attention.dense": Role.ATTENTION_OUT,
        "post_attention_layernorm": Role.MLP_NORM,
        "mlp.dense_h_to_4h": Role.MLP_IN,
        "mlp.dense_4h_to_h": Role.MLP_OUT,
    },
    norm=Norm(epsilon="eps", centred=True),
    fields={
        "layers": "num_hidden_layers",
        "vocabulary": "vocab_size",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "intermediate": "intermediate_size",
    },
    tuple_blocks=True,
    parallel="use_parallel_residual",
    buffers=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
)
