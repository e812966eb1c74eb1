"""What a criterion is: something that watches a model compute and ends with scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig

from llmprune.models.families import Parameter, Shape, family_of
from llmprune.utils.registry import Registry


class ScoreSection(StrEnum):
    """The part of scores.json that a criterion writes to.

    ``blocks``: one number per block, higher = keep. ``subblocks``: the same for attention or MLP. ``spans``: by length
    (as a string), one number for each start. ``pairs``: a matrix. ``units``: by unit (heads, kv_groups, channels,
    hidden, experts), one number for each unit of each block, higher = keep.
    """

    BLOCKS = "blocks"
    SUBBLOCKS = "subblocks"
    SPANS = "spans"
    PAIRS = "pairs"
    UNITS = "units"


@dataclass(frozen=True)
class ScoringJob:
    """What a criterion knows before it sees anything.

    Attributes:
        config: the model's.
        device: where to keep sums.
        row_reduction: see ``llmprune.pruning.scoring.weights``.
        matrix_reduction: see there.
        sequence_aggregation: of activations, over the tokens of a sample: mean or l2 (root mean square).
        batch_aggregation: of them, over samples.
        seed: of the random order.
    """

    config: PretrainedConfig
    device: torch.device
    row_reduction: str = "sum"
    matrix_reduction: str = "sum"
    sequence_aggregation: str = "mean"
    batch_aggregation: str = "mean"
    seed: int = 17

    @cached_property
    def shape(self) -> Shape:
        """The model's."""
        return family_of(self.config).shape(self.config)

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return self.shape.layers

    def locate(self, block: int, name: str) -> Parameter:
        """What the family says of a block's parameter."""
        family = family_of(self.config)
        return family.locate(f"{family.blocks}.{block}.{name}")

    def zeros(self, *size: int) -> Tensor:
        """Sums to fill, float64 (float32 where the device has none)."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.zeros(*size, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class BlockStep:
    """One block's work on some calibration samples, [samples, length, hidden] each.

    Attributes:
        block: its number.
        first: number of the first of these samples, among those of one forward pass.
        before: the residual stream that it read.
        after: that it left.
        updates: what attention and MLP added, by sub-layer.
        parallel: whether both read ``before``.
    """

    block: int
    first: int
    before: Tensor
    after: Tensor
    updates: dict[str, Tensor]
    parallel: bool


class Criterion:
    """A way to score. Subclasses take what they need; all sums are over samples or tokens, so that they add up over
    batches and ranks in any order.

    Attributes:
        section: where its result goes, under its registered name.
        reads: what it needs: ``states``, ``updates``, ``activations``, ``weights``, ``gradients``, ``removals``, or
            nothing.
        needs_experts: whether it is one of mixtures of experts only.
    """  # noqa: D205

    section: ClassVar[ScoreSection] = ScoreSection.BLOCKS
    reads: ClassVar[str | None] = None
    needs_experts: ClassVar[bool] = False

    def __init__(self, job: ScoringJob) -> None:
        """Start with empty sums."""
        self.job = job

    def observe(self, step: BlockStep) -> None:
        """Take in one block's work (``states``, ``updates``)."""

    def read(self, block: int, dimension: str, sublayer: str, values: Tensor) -> None:
        """Take in what a sub-layer's matrices read (``activations``), [samples, length, size].

        Args:
            block: its number.
            dimension: ``hidden`` for the sub-layer's input, ``query`` for the heads' output, ``channel`` for the MLP's.
            sublayer: ``attention`` or ``mlp``.
            values: what is read.
        """

    def expert(self, block: int, number: int, output: Tensor) -> None:
        """Take in an expert's output for the tokens that it sees (``activations``), [tokens, hidden]."""

    def weigh(self, block: int, name: str, weight: Tensor) -> None:
        """Take in a weight matrix or the weight of a norm (``weights``)."""

    def gradient(self, block: int, name: str, weight: Tensor, gradient: Tensor) -> None:
        """Take in a weight and the gradient of one sample's mean loss (``gradients``)."""

    def losses(self, block: int | None, loss: Tensor, tokens: Tensor) -> None:
        """Take in the summed losses (nats) and token counts of samples, [samples] each, with ``block`` removed
        (``removals``); None = the whole model.
        """  # noqa: D205

    def sums(self) -> Sequence[Tensor]:
        """What is to be added up over ranks, in place; the same tensors on every rank."""
        return ()

    def result(self) -> Any:
        """The scores, as plain numbers."""
        raise NotImplementedError


CRITERIA: Registry[type[Criterion]] = Registry("criteria", "criterion")
