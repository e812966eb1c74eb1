"""The parts of a checkpoint that are exported."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from llmprune.plans.plan import Plan
from llmprune.pruning.replacements.custom_block import Network


@dataclass(frozen=True)
class Result:
    """A model during the conversion of a checkpoint to a Hugging Face folder; every section of the run may change it.

    Attributes:
        weights: model's weights by Hugging Face name; each is read when it is accessed.
        plan: plan of the parts that are kept.
        network: network that no config of the model's family can describe; None = no such network.
        newest: whether the user named the run folder instead of a checkpoint, so that the run's best result may be
            used.
    """

    weights: Mapping[str, Tensor]
    plan: Plan
    network: Network | None = None
    newest: bool = False
