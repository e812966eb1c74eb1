"""What is exported of a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from llmprune.plans.plan import Plan
from llmprune.pruning.replacements.custom_block import Network


@dataclass(frozen=True)
class Result:
    """A model on its way from a checkpoint to a Hugging Face folder; every section of the run may change it.

    Attributes:
        weights: the model's, by Hugging Face name, each read when it is asked for.
        plan: what of it stays.
        network: what no config of its family can describe; None = nothing.
        newest: whether the checkpoint was named by its run's folder, so that the run's best may stand for it.
    """

    weights: Mapping[str, Tensor]
    plan: Plan
    network: Network | None = None
    newest: bool = False
