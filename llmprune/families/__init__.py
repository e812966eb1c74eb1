"""The model families that llmprune can prune."""

from transformers import PretrainedConfig

from llmprune.errors import UserError
from llmprune.families.base import (
    AXES,
    NORMS,
    SUBLAYERS,
    Axis,
    Family,
    Parameter,
    Role,
    Shape,
    shape_from,
    target_shape,
)
from llmprune.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3

__all__ = [
    "AXES",
    "FAMILIES",
    "NORMS",
    "SUBLAYERS",
    "Axis",
    "Family",
    "Parameter",
    "Role",
    "Shape",
    "family_of",
    "shape_from",
    "target_shape",
]

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a Hugging Face config.

    Raises:
        UserError: no family knows this architecture; the message names those that are supported.
    """
    for family in FAMILIES.values():
        if config.model_type in family.model_types:
            return family
    supported = sorted(model_type for family in FAMILIES.values() for model_type in family.model_types)
    raise UserError(
        f"the architecture '{config.model_type or type(config).__name__}' is not supported; supported: "
        f"{', '.join(supported)}"
    )
