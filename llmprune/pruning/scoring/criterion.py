"""The base class of criteria: a criterion observes a model's computation and returns scores."""

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
    """The part of scores.json that contains a criterion's result.

    ``blocks``: one number per block, higher = keep. ``subblocks``: one number per attention or MLP, higher = keep.
    ``spans``: by length (as a string), one number for each start. ``pairs``: a matrix. ``units``: by unit (heads,
    kv_groups, channels, hidden, experts), one number for each unit of each block, higher = keep.
    """

    BLOCKS = "blocks"
    SUBBLOCKS = "subblocks"
    SPANS = "spans"
    PAIRS = "pairs"
    UNITS = "units"


@dataclass(frozen=True)
class ScoringJob:
    """The model's config and the settings that a criterion is created with.

    Attributes:
        config: config of the model.
        device: device of the sums.
        row_reduction: reduction over the rows of a matrix, see ``llmprune.pruning.scoring.weights``.
        matrix_reduction: reduction over a block's matrices, see ``llmprune.pruning.scoring.weights``.
        sequence_aggregation: aggregation of activations over the tokens of a sample: mean or l2 (root mean square).
        batch_aggregation: aggregation of activations over samples: mean or l2 (root mean square).
        seed: seed of the random order.
    """

    config: PretrainedConfig
    device: torch.device
    row_reduction: str = "sum"
    matrix_reduction: str = "sum"
    sequence_aggregation: str = "l2"
    batch_aggregation: str = "l2"
    seed: int = 17

    @cached_property
    def shape(self) -> Shape:
        """The shape of the model."""
        return family_of(self.config).shape(self.config)

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return self.shape.layers

    def locate(self, block: int, name: str) -> Parameter:
        """The family's description of a block's parameter."""
        family = family_of(self.config)
        return family.locate(f"{family.blocks}.{block}.{name}")

    def zeros(self, *size: int) -> Tensor:
        """A tensor of zeros for sums, float64 (float32 on devices without float64)."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.zeros(*size, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class BlockStep:
    """The input and output of one block for some calibration samples, [samples, length, hidden] each.

    Attributes:
        block: number of the block.
        first: number of the first of these samples among those of one forward pass.
        before: residual stream before the block.
        after: residual stream after the block.
        updates: contributions of attention and MLP to the residual stream, by sub-layer.
        parallel: whether attention and MLP both read ``before``.
    """

    block: int
    first: int
    before: Tensor
    after: Tensor
    updates: dict[str, Tensor]
    parallel: bool


GRADIENTS = ("gradients", "entropy_gradients")


class Criterion:
    """A method of scoring. Subclasses override the methods that they need; all sums are over samples or tokens, so that
    they can be added over batches and ranks in any order.

    Attributes:
        section: part of scores.json for the result, under the criterion's registered name.
        reads: kind of data that the criterion needs: ``states``, ``updates``, ``activations``, ``weights``,
            ``gradients`` (of the loss), ``entropy_gradients`` (of the predictions' entropy), ``removals``, or None.
        needs_experts: whether the criterion works only for mixtures of experts.
        caution: what to know before a model is cut by it, as a sentence without a stop; empty = nothing.
    """  # noqa: D205

    section: ClassVar[ScoreSection] = ScoreSection.BLOCKS
    reads: ClassVar[str | None] = None
    needs_experts: ClassVar[bool] = False
    caution: ClassVar[str] = ""

    def __init__(self, job: ScoringJob) -> None:
        """Start with empty sums."""
        self.job = job

    @classmethod
    def check_samples(cls, samples: int, length: int) -> None:
        """Refuse, or warn of, calibration samples that are too few or too short, before any work.

        Args:
            samples: number of samples.
            length: number of tokens in each sample.

        Raises:
            UserError: the criterion has no value on such samples.
        """

    def observe(self, step: BlockStep) -> None:
        """Process the input and output of one block (``states``, ``updates``)."""

    def read(self, block: int, dimension: str, sublayer: str, values: Tensor) -> None:
        """Process the input of a sub-layer's matrices (``activations``), [samples, length, size].

        Args:
            block: number of the block.
            dimension: dimension of the input: ``hidden`` for the sub-layer's input, ``query`` for the heads' output,
                ``channel`` for the MLP's channels.
            sublayer: name of the sub-layer: ``attention`` or ``mlp``.
            values: input of the matrices, [samples, length, size].
        """

    def expert(self, block: int, number: int, output: Tensor) -> None:
        """Process an expert's output for the tokens that the router sends to it (``activations``), [tokens, hidden]."""

    def weigh(self, block: int, name: str, weight: Tensor) -> None:
        """Process a weight matrix or the weight of a norm (``weights``)."""

    def gradient(self, block: int, name: str, weight: Tensor, gradient: Tensor) -> None:
        """Process a weight and its gradient (``gradients``, ``entropy_gradients``).

        Args:
            block: number of the block.
            name: name of the weight within the block.
            weight: the weight.
            gradient: gradient of one sample's mean loss, or of the mean entropy of its predictions.
        """

    def losses(self, block: int | None, loss: Tensor, tokens: Tensor) -> None:
        """Process the summed losses (nats) and token counts of samples, [samples] each, with ``block`` removed
        (``removals``); None = the whole model.
        """  # noqa: D205

    def sums(self) -> Sequence[Tensor]:
        """The tensors to add up over ranks, in place; every rank has the same list of tensors."""
        return ()

    def result(self) -> Any:
        """The scores as plain numbers."""
        raise NotImplementedError


CRITERIA: Registry[type[Criterion]] = Registry("criteria", "criterion")
