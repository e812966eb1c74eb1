"""Criteria of units: heads, key/value groups, MLP channels, hidden dimensions and experts."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.models.families import Parameter, Shape
from llmprune.pruning.scoring.criterion import CRITERIA, GRADIENTS, Criterion, ScoreSection, ScoringJob
from llmprune.utils.errors import UserError, nearest

AGGREGATIONS = ("mean", "l2")
NO_BETTER = (
    "when it chose heads or hidden dimensions of a real model, the result was no better than with a random choice "
    "(unit_activation_l2 was far better; docs/width.md, which criterion)"
)
DIGITS = 8  # significant digits kept of every score: a large model has millions of scores


def unit_sums(parameter: Parameter, values: Tensor, shape: Shape) -> dict[str, Tensor]:
    """The sums of one parameter's values over each of the units that it belongs to.

    Args:
        parameter: parameter as its family describes it.
        values: values to add up, one for each number of the parameter.
        shape: shape of the model.

    Returns:
        One sum for each unit, float32, by dimension of ``Axis``; an expert's channels are not units, the expert is one
        unit.
    """
    found: dict[str, Tensor] = {}
    for number, axis in enumerate(parameter.axes):
        if not axis.dimensions or (parameter.expert is not None and axis.dimensions == ("channel",)):
            continue
        along = values.float() if values.ndim == 1 else values.sum(1 - number, dtype=torch.float32)
        sizes = [shape.units(dimension) for dimension in axis.dimensions]
        parts = along.split([count * size * axis.repeat for count, size in sizes])
        for dimension, (count, _), part in zip(axis.dimensions, sizes, parts, strict=True):
            summed = part.unflatten(0, (count, -1)).sum(1)
            found[dimension] = found[dimension] + summed if dimension in found else summed
    if parameter.expert is not None:
        found["expert"] = torch.zeros(shape.experts or 0, device=values.device)
        found["expert"][parameter.expert] = values.sum(dtype=torch.float32)
    return found


class _Units(Criterion):
    """Criteria that score units by sums, [blocks, units] for each dimension of ``Axis``."""

    section = ScoreSection.UNITS
    dimensions: ClassVar[tuple[str, ...]] = ("query", "key_value", "channel", "hidden", "expert")

    def __init__(self, job: ScoringJob) -> None:
        super().__init__(job)
        dense = job.shape.experts is None
        self._sums = {
            dimension: job.zeros(job.layers, job.shape.units(dimension)[0])
            for dimension in self.dimensions
            if dimension != ("expert" if dense else "channel")
        }

    def sums(self) -> Sequence[Tensor]:
        return [self._sums[dimension] for dimension in sorted(self._sums)]

    def scored(self) -> Mapping[str, Tensor]:
        """The scores by dimension; those of ``key_value`` without the queries of the group."""
        return self._sums

    def result(self) -> dict[str, list[list[float]]]:
        found = dict(self.scored())
        result = {}
        if "query" in found:
            queries = found.pop("query")
            result["heads"] = queries
            result["kv_groups"] = queries.unflatten(1, (self.job.shape.kv_heads, -1)).sum(2) + found.pop("key_value", 0)
        result |= {_NAMES[dimension]: scores for dimension, scores in found.items()}
        return {unit: [_rounded(row) for row in scores.tolist()] for unit, scores in result.items()}


_NAMES = {"channel": "channels", "hidden": "hidden", "expert": "experts"}


def _rounded(row: list[float]) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in row]


class _OfWeights(_Units):
    """Criteria that sum over a unit's weights; biases are left out, as for blocks."""

    def sums(self) -> Sequence[Tensor]:
        return super().sums() if self.reads in GRADIENTS else ()  # every rank has all weights

    def _add(self, block: int, name: str, values: Tensor) -> None:
        for dimension, sums in unit_sums(self.job.locate(block, name), values, self.job.shape).items():
            self._sums[dimension][block] += sums


@CRITERIA.register("unit_magnitude_l1")
class UnitMagnitudeL1(_OfWeights):
    """Sum of |W| over the rows and columns of each unit."""

    reads = "weights"

    def weigh(self, block: int, name: str, weight: Tensor) -> None:
        self._add(block, name, weight.abs())


@CRITERIA.register("unit_magnitude_l2")
class UnitMagnitudeL2(_OfWeights):
    """Sum of W² over the rows and columns of each unit."""

    reads = "weights"
    caution = NO_BETTER

    def weigh(self, block: int, name: str, weight: Tensor) -> None:
        self._add(block, name, weight.float().square())


@CRITERIA.register("unit_taylor")
class UnitTaylor(_OfWeights):
    """Sum of |W ∘ ∂L/∂W| over each unit, absolute values taken for every sample (LLM-Pruner, arXiv:2305.11627)."""

    reads = "gradients"
    caution = NO_BETTER

    def gradient(self, block: int, name: str, weight: Tensor, gradient: Tensor) -> None:
        self._add(block, name, (weight * gradient).abs())


@CRITERIA.register("unit_taylor_entropy")
class UnitTaylorEntropy(UnitTaylor):
    """Sum of |W ∘ ∂H/∂W| over each unit, H the entropy of the predictions; no labels (HFPrune, arXiv:2603.08083)."""

    reads = "entropy_gradients"


class _OfActivations(_Units):
    """Criteria that average each unit's output over calibration tokens.

    Heads are measured at the input of the attention's output matrix, channels at the input of the MLP's output matrix,
    hidden dimensions at the input of both sub-layers (after the norm, if there is one), experts at their output. The
    values of tokens are aggregated to a value of the sample, and those of samples to a score, by the chosen
    aggregations, mean or root mean square; for experts, which process only some tokens, it is always the mean over all
    tokens.
    """

    reads = "activations"
    dimensions = ("query", "channel", "hidden", "expert")

    def __init__(self, job: ScoringJob) -> None:
        super().__init__(job)
        for name in (job.sequence_aggregation, job.batch_aggregation):
            if name not in AGGREGATIONS:
                raise UserError(f"there is no aggregation '{name}'; {nearest(name, AGGREGATIONS)}")
        self._of_mlp = job.zeros(job.layers, job.shape.hidden)  # hidden dimensions at the MLP's input
        self._samples, self._tokens = job.zeros(job.layers), job.zeros(job.layers)

    def magnitude(self, values: Tensor) -> Tensor:
        """The magnitudes of units, computed over the last dimension."""
        raise NotImplementedError

    def read(self, block: int, dimension: str, sublayer: str, values: Tensor) -> None:
        samples, length = values.shape[:2]
        if dimension == "query":
            self._samples[block] += samples
            self._tokens[block] += samples * length
            values = self.magnitude(values.unflatten(-1, (self.job.shape.heads, -1)))
        power = AGGREGATIONS.index(self.job.sequence_aggregation) + 1
        of_samples = torch.linalg.vector_norm(values, power, dim=1, dtype=torch.float32) / length ** (1 / power)
        if self.job.batch_aggregation == "l2":
            of_samples = of_samples.square()
        sums = self._of_mlp if (dimension, sublayer) == ("hidden", "mlp") else self._sums[dimension]
        sums[block] += of_samples.sum(0)

    def expert(self, block: int, number: int, output: Tensor) -> None:
        self._sums["expert"][block, number] += self.magnitude(output).sum(dtype=torch.float32)

    def sums(self) -> Sequence[Tensor]:
        return [*super().sums(), self._of_mlp, self._samples, self._tokens]

    def scored(self) -> Mapping[str, Tensor]:
        scores = {}
        for dimension, sums in self._sums.items():
            if dimension == "expert":
                scores[dimension] = sums / self._tokens[:, None]
            else:
                scores[dimension] = self._of_all_samples(sums)
        scores["hidden"] = scores["hidden"] + self._of_all_samples(self._of_mlp)
        return scores

    def _of_all_samples(self, sums: Tensor) -> Tensor:
        means = sums / self._samples[:, None]
        return means.sqrt() if self.job.batch_aggregation == "l2" else means


@CRITERIA.register("unit_activation_l2")
class UnitActivationL2(_OfActivations):
    """Mean L2 norm of a unit's output (Minitron, arXiv:2407.14679, section 2.2)."""

    def magnitude(self, values: Tensor) -> Tensor:
        return torch.linalg.vector_norm(values, 2, dim=-1, dtype=torch.float32)


@CRITERIA.register("unit_activation_abs")
class UnitActivationAbs(_OfActivations):
    """Mean absolute value of a unit's output; equal to the L2 norm if a unit is one number."""

    def magnitude(self, values: Tensor) -> Tensor:
        return torch.linalg.vector_norm(values, 1, dim=-1, dtype=torch.float32) / values.shape[-1]


@CRITERIA.register("expert_frequency")
class ExpertFrequency(_Units):
    """Share of the tokens that the router sends to each expert."""

    reads = "activations"
    needs_experts = True
    dimensions = ("expert",)

    def __init__(self, job: ScoringJob) -> None:
        super().__init__(job)
        self._tokens = job.zeros(job.layers)

    def read(self, block: int, dimension: str, sublayer: str, values: Tensor) -> None:
        if dimension == "query":
            self._tokens[block] += values.shape[0] * values.shape[1]

    def expert(self, block: int, number: int, output: Tensor) -> None:
        self._sums["expert"][block, number] += len(output)

    def sums(self) -> Sequence[Tensor]:
        return [*super().sums(), self._tokens]

    def scored(self) -> Mapping[str, Tensor]:
        return {"expert": self._sums["expert"] / self._tokens[:, None]}


@CRITERIA.register("unit_random")
class UnitRandom(_Units):
    """A seeded random order of the units."""

    def sums(self) -> Sequence[Tensor]:
        return ()

    def scored(self) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(self.job.seed)
        return {name: torch.rand(self._sums[name].shape, generator=generator) for name in sorted(self._sums)}
