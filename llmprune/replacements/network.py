"""A stand-in that no config of its family can describe, on its way into a Hugging Face folder."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from llmprune.families import family_of
from llmprune.models import modeling_llmprune
from llmprune.models.modeling_llmprune import config_class, host, register


@dataclass(frozen=True)
class Network:
    """A network between two blocks.

    Attributes:
        kind: its name in ``modeling_llmprune.NETWORKS``.
        settings: what it is made with.
        place: the number of the block behind it, in the exported model.
        tensors: by name.
    """

    kind: str
    settings: Mapping[str, Any]
    place: int
    tensors: Mapping[str, Tensor]

    def config(self, plain: PretrainedConfig) -> PretrainedConfig:
        """The config of a model with the network, from that of the model without."""
        model_type = plain.model_type
        fields = {name: value for name, value in plain.to_dict().items() if name != "model_type"}
        config = config_class(model_type)(**fields)
        register(config.model_type)
        config._attn_implementation = plain._attn_implementation
        config.llmprune_stand_in = {
            "kind": self.kind,
            "settings": dict(self.settings),
            "place": self.place,
            "blocks": family_of(plain).blocks,
        }
        module = Path(modeling_llmprune.__file__).stem
        config.auto_map = {
            "AutoConfig": f"{module}.config_of_{model_type}",
            "AutoModelForCausalLM": f"{module}.model_of_{model_type}",
        }
        config.architectures = [f"model_of_{model_type}"]
        return config

    def named(self, plain: PretrainedConfig) -> dict[str, Tensor]:
        """Its tensors under the names that they have in the model."""
        prefix = f"{family_of(plain).blocks}.{host(self.place)}.stand_in."
        return {prefix + name: tensor for name, tensor in self.tensors.items()}

    @staticmethod
    def write_code(folder: Path) -> None:
        """Put the modelling file into a model's folder."""
        shutil.copy(modeling_llmprune.__file__, folder)
