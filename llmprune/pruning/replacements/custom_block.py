"""A replacement module that no config of its family can describe, prepared for export to a Hugging Face folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from llmprune.models.families import family_of
from llmprune.models.modeling_llmprune import host
from llmprune.models.own_model_types import own_config


@dataclass(frozen=True)
class Network:
    """A replacement network between two blocks.

    Attributes:
        kind: name of the network's class in ``modeling_llmprune.NETWORKS``.
        settings: arguments that the network is created with.
        place: number of the block after the network, in the exported model.
        tensors: tensors of the network, by name.
    """

    kind: str
    settings: Mapping[str, Any]
    place: int
    tensors: Mapping[str, Tensor]

    def config(self, plain: PretrainedConfig) -> PretrainedConfig:
        """The config of a model with the network, from the config of the model without it."""
        config = own_config(plain)
        config.llmprune_replacement = {
            "kind": self.kind,
            "settings": dict(self.settings),
            "place": self.place,
            "blocks": family_of(plain).blocks,
        }
        return config

    def named(self, plain: PretrainedConfig) -> dict[str, Tensor]:
        """The network's tensors by their names in the model."""
        prefix = f"{family_of(plain).blocks}.{host(self.place)}.replacement."
        return {prefix + name: tensor for name, tensor in self.tensors.items()}
