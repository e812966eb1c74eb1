"""llmprune's own model types: Transformers configs with additions, and the modelling file that such models need."""

import shutil
from dataclasses import asdict
from pathlib import Path

from transformers import PretrainedConfig

from llmprune.models import modeling_llmprune
from llmprune.models.families import OWN, RicherHeadsConfig, attention_output, family_of, richer_heads_of
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
    family = family_of(plain)
    config = own_config(plain)
    config.llmprune_richer_heads = {
        "blocks": family.blocks,
        "output": attention_output(family),
        **asdict(heads),
    }
    return config
