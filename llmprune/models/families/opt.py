"""OPT: LayerNorm, learned positions, biases in all layers, and a head size that is always hidden / heads."""

from llmprune.models.families.base import Family, Norm
from llmprune.models.families.roles_and_axes import Role

OPT = Family(
    name="opt",
    description="OPT (all but 350m, which has its norms elsewhere): LayerNorm, learned positions, biases",
    model_types=("opt",),
    outer={
        "model.decoder.embed_tokens": Role.EMBEDDING,
        "model.decoder.embed_positions": Role.POSITIONS,
        "model.decoder.final_layer_norm": Role.FINAL_NORM,
        "lm_head": Role.OUTPUT,
    },
    blocks="model.decoder.layers",
    block={
        "self_attn_layer_norm": Role.ATTENTION_NORM,
        "self_attn.q_proj": Role.QUERY,
        "self_attn.k_proj": Role.KEY_VALUE,
        "self_attn.v_proj": Role.KEY_VALUE,
        "self_attn.out_proj": Role.ATTENTION_OUT,
        "final_layer_norm": Role.MLP_NORM,
        "fc1": Role.MLP_IN,
        "fc2": Role.MLP_OUT,
    },
    norm=Norm(epsilon="eps", centred=True),
    fields={
        "layers": "num_hidden_layers",
        "vocabulary": "vocab_size",
        "hidden": "hidden_size",
        "heads": "num_attention_heads",
        "intermediate": "ffn_dim",
    },
    tuple_blocks=True,
    document_masks=True,
    aliases={"word_embed_proj_dim": "hidden"},
    requires={"do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True},
)
