"""Mixtures of experts: like Llama, with many MLPs, of which a router chooses some for every token."""

from dataclasses import replace

from llmprune.models.families.llama import LLAMA, QWEN3
from llmprune.models.families.roles_and_axes import Role

_ATTENTION = {name: role for name, role in LLAMA.block.items() if not name.startswith("mlp.")}
_NO_CHANNELS = {"intermediate": "every expert has channels of its own"}

MIXTRAL = replace(
    LLAMA,
    name="mixtral",
    description="Mixtral: as Mistral, a mixture of experts",
    model_types=("mixtral",),
    whole_heads=False,
    block={
        **_ATTENTION,
        "block_sparse_moe.gate": Role.ROUTER,
        "block_sparse_moe.experts.*.w1": Role.MLP_IN,
        "block_sparse_moe.experts.*.w3": Role.MLP_IN,
        "block_sparse_moe.experts.*.w2": Role.MLP_OUT,
    },
    fields={**LLAMA.fields, "experts": "num_local_experts"},
    chosen_experts="num_experts_per_tok",
    refused_gates=_NO_CHANNELS,
)

QWEN3_MOE = replace(
    QWEN3,
    name="qwen3_moe",
    description="Qwen3 mixtures of experts (every block sparse)",
    model_types=("qwen3_moe",),
    block={
        **_ATTENTION,
        "self_attn.q_norm": Role.HEAD_NORM,
        "self_attn.k_norm": Role.HEAD_NORM,
        "mlp.gate": Role.ROUTER,
        "mlp.experts.*.gate_proj": Role.MLP_IN,
        "mlp.experts.*.up_proj": Role.MLP_IN,
        "mlp.experts.*.down_proj": Role.MLP_OUT,
    },
    fields={**LLAMA.fields, "intermediate": "moe_intermediate_size", "experts": "num_experts"},
    requires={"mlp_only_layers": [], "decoder_sparse_step": 1},
    chosen_experts="num_experts_per_tok",
    refused_gates=_NO_CHANNELS,
)
