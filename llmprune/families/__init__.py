"""The model families that llmprune can prune."""

from transformers import PretrainedConfig

from llmprune.errors import UserError
from llmprune.families.base import Family, Parameter
from llmprune.families.gemma import GEMMA, GEMMA2, GEMMA3
from llmprune.families.gpt_neox import GPT_NEOX
from llmprune.families.llama import LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3
from llmprune.families.mixture import MIXTRAL, QWEN3_MOE
from llmprune.families.opt import OPT
from llmprune.families.roles import AXES, EMBEDDINGS, NORMS, OUTPUTS, SUBLAYERS, Axis, Role
from llmprune.families.shapes import PRUNED, Shape, shape_from, shapes_between, target_shape

__all__ = [
    "AXES",
    "EMBEDDINGS",
    "FAMILIES",
    "NORMS",
    "OUTPUTS",
    "PRUNED",
    "SUBLAYERS",
    "Axis",
    "Family",
    "Parameter",
    "Role",
    "Shape",
    "family_of",
    "shape_from",
    "shapes_between",
    "target_shape",
]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, OPT, GPT_NEOX, PHI3, OLMO2, MIXTRAL, QWEN3_MOE,
    )
}  # fmt: skip


def family_of(config: PretrainedConfig) -> Family:
    """The family of a Hugging Face config.

    Raises:
        UserError: no family knows this architecture, or not this variant; the message names what is supported.
    """
    for family in FAMILIES.values():
        if config.model_type in family.model_types:
            family.check(config)
            return family
    supported = sorted(model_type for family in FAMILIES.values() for model_type in family.model_types)
    raise UserError(
        f"the architecture '{config.model_type or type(config).__name__}' is not supported; supported: "
        f"{', '.join(supported)}"
    )
