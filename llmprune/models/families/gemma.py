"""Gemma: like Llama, but norms add one to their weight and the embedding is scaled by the root of the hidden size."""

from dataclasses import replace

from llmprune.models.families.base import Norm
from llmprune.models.families.llama import LLAMA
from llmprune.models.families.roles_and_axes import Role

GEMMA = replace(
    LLAMA,
    name="gemma",
    description="Gemma 1: as Llama, with norms that add one to their weight and scaled embeddings",
    model_types=("gemma",),
    whole_heads=False,
    norm=Norm(epsilon="eps", offset=1.0),
    scaled_embedding=True,
)

GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    description="Gemma 2: as Gemma, with norms after attention and MLP too, and alternating sliding windows",
    model_types=("gemma2",),
    whole_heads=True,
    block={
        "input_layernorm": Role.ATTENTION_NORM,
        "self_attn.q_proj": Role.QUERY,
        "self_attn.k_proj": Role.KEY_VALUE,
        "self_attn.v_proj": Role.KEY_VALUE,
        "self_attn.o_proj": Role.ATTENTION_OUT_TO_NORM,
        "post_attention_layernorm": Role.ATTENTION_POST_NORM,
        "pre_feedforward_layernorm": Role.MLP_NORM,
        "mlp.gate_proj": Role.MLP_IN,
        "mlp.up_proj": Role.MLP_IN,
        "mlp.down_proj": Role.MLP_OUT_TO_NORM,
        "post_feedforward_layernorm": Role.MLP_POST_NORM,
    },
    per_block=("layer_types",),
    softcap="final_logit_softcapping",
    tuple_blocks=True,
)

GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    description="Gemma 3 (text models): as Gemma 2, with a norm of every query and key",
    model_types=("gemma3_text",),
    block={**GEMMA2.block, "self_attn.q_norm": Role.HEAD_NORM, "self_attn.k_norm": Role.HEAD_NORM},
)
