"""llmprune's own model types: Transformers configs with additions, and the modelling file that such models need."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import CONFIG_MAPPING, PretrainedConfig

from llmprune.models import modeling_llmprune
from llmprune.models.families import (
    OWN,
    SKIPPED,
    RicherHeadsConfig,
    attention_output,
    family_of,
    parts_of,
    refuse_skipped,
    richer_heads_of,
)
from llmprune.models.modeling_llmprune import config_class, register
from llmprune.utils.errors import UserError


def own_config(plain: PretrainedConfig) -> PretrainedConfig:
    """The config of llmprune's own model type for a plain config; the given config may be of an own type already."""
    model_type = plain.model_type.removeprefix(OWN)
    fields = {name: value for name, value in plain.to_dict().items() if name != "model_type"}
    config = config_class(model_type)(**fields)
    register(config.model_type)
    config._attn_implementation = plain._attn_implementation
    module = Path(modeling_llmprune.__file__).stem
    config.auto_map = {
        "AutoConfig": f"{module}.config_of_{model_type}",
        "AutoModelForCausalLM": f"{module}.model_of_{model_type}",
    }
    config.architectures = [f"model_of_{model_type}"]
    return config


def _plain_config(own: PretrainedConfig) -> PretrainedConfig:
    """The config of the Transformers model type that an own one is based on, without additions."""
    model_type = own.model_type.removeprefix(OWN)
    left_out = {"model_type", "auto_map", "architectures", SKIPPED, "llmprune_richer_heads", "llmprune_replacement"}
    config = CONFIG_MAPPING[model_type](**{n: v for n, v in own.to_dict().items() if n not in left_out})
    config._attn_implementation = own._attn_implementation
    return config


def needs_code(config: PretrainedConfig) -> bool:
    """Whether models with this config load only with the modelling file in their folder."""
    return str(config.model_type).startswith(OWN)


def write_code(folder: Path) -> None:
    """Copy the modelling file into a model's folder."""
    shutil.copy(modeling_llmprune.__file__, folder)


def with_richer_heads(plain: PretrainedConfig, heads: RicherHeadsConfig) -> PretrainedConfig:
    """The config of a model with richer heads, from the config of the model without them.

    Raises:
        UserError: the model has richer heads already.
    """
    if richer_heads_of(plain) is not None:
        raise UserError("the heads of this model are richer already")
    refuse_skipped(plain, "given richer heads")
    family = family_of(plain)
    config = own_config(plain)
    config.llmprune_richer_heads = {
        "blocks": family.blocks,
        "output": attention_output(family),
        **asdict(heads),
    }
    return config


def with_skipped(plain: PretrainedConfig, skipped: Mapping[str, Sequence[int]]) -> PretrainedConfig:
    """The config of a model some of whose blocks lack a sub-layer.

    Args:
        plain: config of the model with all sub-layers; it may be of an own model type.
        skipped: numbers of the blocks without the sub-layer, by sub-layer: ``attention``, ``mlp``.

    Raises:
        UserError: the MLPs are mixtures of experts, or no block keeps its attention.
    """
    if not any(skipped.values()):
        return _plain_config(plain)
    family = family_of(plain)
    if skipped.get("mlp") and family.expert_modules is not None:
        raise UserError("blocks without an MLP are not possible for mixtures of experts: take out experts, or blocks")
    if len(skipped.get("attention", ())) >= family.shape(plain).layers:
        raise UserError("a model without any attention does not see the tokens before: keep one at least")
    kinds = getattr(plain, "layer_types", None) or []
    if kinds and all(number in skipped.get("attention", ()) for number, kind in enumerate(kinds) if kind == kinds[0]):
        raise UserError(f"no {kinds[0]} would stay, which the key/value cache begins with: keep one at least")
    config = own_config(plain)
    parts = {name: asdict(parts_of(family, name)) for name in ("attention", "mlp")}
    setattr(
        config,
        SKIPPED,
        {"blocks": family.blocks, "parts": parts, **{name: sorted(numbers) for name, numbers in skipped.items()}},
    )
    return config
