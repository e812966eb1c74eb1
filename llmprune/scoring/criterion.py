"""What a criterion is: something that watches a model compute and ends with scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmprune.registry import Registry


class Section(str, Enum):
    """The part of scores.json that a criterion writes to.

    ``blocks``: one number per block, higher = keep. ``subblocks``: the same for attention or MLP. ``spans``: by length
    (as a string), one number for each start. ``pairs``: a matrix.
    """

    BLOCKS = "blocks"
    SUBBLOCKS = "subblocks"
    SPANS = "spans"
    PAIRS = "pairs"


@dataclass(frozen=True)
class ScoringJob:
    """What a criterion knows before it sees anything.

    Attributes:
        layers: number of blocks.
        device: where to keep sums.
        row_reduction: see ``llmprune.scoring.reductions``.
        matrix_reduction: see there.
        seed: of the random order.
    """

    layers: int
    device: torch.device
    row_reduction: str = "sum"
    matrix_reduction: str = "sum"
    seed: int = 17

    def zeros(self, *size: int) -> Tensor:
        """Sums to fill, float64 (float32 where the device has none)."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.zeros(*size, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class BlockStep:
    """One block's work on some calibration samples, [samples, length, hidden] each.

    Attributes:
        block: its number.
        first: number of the first of these samples, among those that are walked together.
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
        reads: what it needs: ``states``, ``updates``, ``weights``, ``gradients``, ``removals``, or nothing.
    """  # noqa: D205

    section: ClassVar[Section] = Section.BLOCKS
    reads: ClassVar[str | None] = None

    def __init__(self, job: ScoringJob) -> None:
        """Start with empty sums."""
        self.job = job

    def observe(self, step: BlockStep) -> None:
        """Take in one block's work (``states``, ``updates``)."""

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
