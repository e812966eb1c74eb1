"""The model families that llmprune can prune."""

from functools import cache

from transformers import PretrainedConfig

from llmprune.models.families.base import Family, Parameter
from llmprune.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from llmprune.models.families.gpt_neox import GPT_NEOX
from llmprune.models.families.llama import LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3
from llmprune.models.families.mixture import MIXTRAL, QWEN3_MOE
from llmprune.models.families.opt import OPT
from llmprune.models.families.richer import FIELD, RicherHeadsConfig, attention_output, module_name, richer_family
from llmprune.models.families.roles_and_axes import AXES, EMBEDDINGS, MATRICES, NORMS, OUTPUTS, SUBLAYERS, Axis, Role
from llmprune.models.families.shapes import PRUNED, Shape, shape_from, shapes_between, target_shape
from llmprune.models.families.skipped import SKIPPED, parts_of, refuse_skipped, skipped_of
from llmprune.utils.errors import UserError
from llmprune.utils.registry import Registry

__all__ = [
    "AXES",
    "EMBEDDINGS",
    "FAMILIES",
    "MATRICES",
    "NORMS",
    "OUTPUTS",
    "OWN",
    "PRUNED",
    "SKIPPED",
    "SUBLAYERS",
    "Axis",
    "Family",
    "Parameter",
    "RicherHeadsConfig",
    "Role",
    "Shape",
    "attention_output",
    "by_model_type",
    "family_of",
    "module_name",
    "parts_of",
    "refuse_skipped",
    "richer_heads_of",
    "shape_from",
    "shapes_between",
    "skipped_of",
    "target_shape",
]

FAMILIES: Registry[Family] = Registry("families", "family")
for _family in (
    LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, OPT, GPT_NEOX, PHI3, OLMO2, MIXTRAL, QWEN3_MOE,
):  # fmt: skip
    FAMILIES.register(_family.name)(_family)

OWN = "llmprune_"  # prefix of llmprune's own model types; also in the modelling file


def richer_heads_of(config: PretrainedConfig) -> RicherHeadsConfig | None:
    """The settings of richer heads in a config; None if the model has none."""
    described = getattr(config, FIELD, None)
    if described is None:
        return None
    return RicherHeadsConfig(described["shared"], described["activation"], described["residual"])


def by_model_type() -> dict[str, Family]:
    """Every family by each of its model types."""
    return _by_model_type(FAMILIES.changes)


@cache
def _by_model_type(changes: int) -> dict[str, Family]:
    return {model_type: family for family in FAMILIES.values() for model_type in family.model_types}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a Hugging Face config.

    Raises:
        UserError: this architecture or variant is not supported; the message names those that are.
    """
    richer = richer_heads_of(config)
    plain = richer is None and not skipped_of(config)
    model_type = config.model_type if plain else config.model_type.removeprefix(OWN)
    family = by_model_type().get(model_type)
    if family is not None:
        family.check_config(config)
        return family if richer is None else richer_family(family, shared=richer.shared)
    supported = sorted(by_model_type())
    raise UserError(
        f"the architecture '{config.model_type or type(config).__name__}' is not supported; supported: "
        f"{', '.join(supported)}"
    )
