"""Configs of llmprune's own model types: those of Transformers with what they can't describe."""

import shutil
from pathlib import Path

from transformers import PretrainedConfig

from llmprune.models import modeling_llmprune
from llmprune.models.families import OWN
from llmprune.models.modeling_llmprune import config_class, register


def own_config(plain: PretrainedConfig) -> PretrainedConfig:
    """The config of the own type that goes with a plain config, which may be of an own type already."""
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
    """Whether models with this config load with the modelling file beside them only."""
    return str(config.model_type).startswith(OWN)


def write_code(folder: Path) -> None:
    """Put the modelling file into a model's folder."""
    shutil.copy(modeling_llmprune.__file__, folder)
