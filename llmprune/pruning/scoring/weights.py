"""Criteria on weights, with or without their gradients.

These criteria read a block's matrices and the weights of its norms; biases are left out, as in the papers.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmprune.pruning.scoring.criterion import CRITERIA, Criterion, ScoringJob

RUINOUS = (
    "when it chose a third of a real model's blocks, perplexity rose from 26 to thousands and more (block_influence: "
    "154; docs/scoring.md, which criterion)"
)


def row_sums(weight: Tensor) -> Tensor:
    """Sums along the rows of a matrix, [rows]; each element of a vector is a row."""
    return weight.flatten(1).sum(1, dtype=torch.float32) if weight.ndim > 1 else weight.float()


class _FromRows(Criterion):
    """Scores from the row sums of every matrix of a block."""

    caution = RUINOUS

    def __init__(self, job: ScoringJob) -> None:
        super().__init__(job)
        self.rows: list[dict[str, Tensor]] = [{} for _ in range(job.layers)]

    def result(self) -> list[float]:
        job = self.job
        return [
            reduce_block([rows[name] for name in sorted(rows)], job.row_reduction, job.matrix_reduction)
            for rows in self.rows
        ]


@CRITERIA.register("magnitude_l1")
class MagnitudeL1(_FromRows):
    """Sum of |W| over a block's matrices and norms (arXiv:2402.02834, section 3.1)."""

    reads = "weights"

    def weigh(self, block: int, name: str, weight: Tensor) -> None:
        self.rows[block][name] = row_sums(weight.abs())


@CRITERIA.register("magnitude_l2")
class MagnitudeL2(_FromRows):
    """Sum of W² over a block's matrices and norms (arXiv:2411.15558)."""

    reads = "weights"

    def weigh(self, block: int, name: str, weight: Tensor) -> None:
        self.rows[block][name] = row_sums(weight.float().square())


@CRITERIA.register("taylor")
class Taylor(_FromRows):
    """Sum of |W ∘ ∂L/∂W|, absolute values taken for every sample: no cancellation between samples."""

    reads = "gradients"

    def weigh(self, block: int, name: str, weight: Tensor) -> None:
        self.rows[block].setdefault(name, torch.zeros(len(weight), device=self.job.device))

    def gradient(self, block: int, name: str, weight: Tensor, gradient: Tensor) -> None:
        self.rows[block][name] += row_sums((weight * gradient).abs())

    def sums(self) -> Sequence[Tensor]:
        return [rows[name] for rows in self.rows for name in sorted(rows)]


@CRITERIA.register("taylor_entropy")
class TaylorEntropy(Taylor):
    """Sum of |W ∘ ∂H/∂W|, H the mean entropy of a sample's predictions; no labels (HFPrune, arXiv:2603.08083)."""

    reads = "entropy_gradients"
    caution = ""  # not measured


@CRITERIA.register("taylor_signed")
class TaylorSigned(Criterion):
    """Sum of |Σ W ∘ ∂L/∂W|, samples added up before the absolute value (arXiv:2305.11627, 2402.02834)."""

    reads = "gradients"
    caution = RUINOUS

    def __init__(self, job: ScoringJob) -> None:
        super().__init__(job)
        self._products: list[dict[str, Tensor]] = [{} for _ in range(job.layers)]

    def weigh(self, block: int, name: str, weight: Tensor) -> None:
        self._products[block].setdefault(name, torch.zeros_like(weight, dtype=torch.float32))

    def gradient(self, block: int, name: str, weight: Tensor, gradient: Tensor) -> None:
        self._products[block][name].addcmul_(weight.float(), gradient.float())

    def sums(self) -> Sequence[Tensor]:
        return [products[name] for products in self._products for name in sorted(products)]

    def result(self) -> list[float]:
        job = self.job
        return [
            reduce_block([row_sums(p[name].abs()) for name in sorted(p)], job.row_reduction, job.matrix_reduction)
            for p in self._products
        ]


# Functions from logarithms to the logarithm of the sum, mean, max or product.
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda logs: logs.logsumexp(0),
    "mean": lambda logs: logs.logsumexp(0) - math.log(len(logs)),
    "max": lambda logs: logs.amax(0),
    "prod": lambda logs: logs.sum(0),
}
_SMALLEST = 1e-300


def reduce_block(rows: Sequence[Tensor], row_reduction: str, matrix_reduction: str) -> float:
    """The score of a block from its matrices' row sums.

    Args:
        rows: sums along the rows (not negative) of every matrix, [rows].
        row_reduction: reduction over the rows of a matrix: sum, mean, max or prod.
        matrix_reduction: reduction over the block's matrices: sum, mean, max or prod.
    """
    matrices = [REDUCTIONS[row_reduction](sums.double().clamp(min=_SMALLEST).log()) for sums in rows]
    value = REDUCTIONS[matrix_reduction](torch.stack(matrices)).item()
    return value if "prod" in (row_reduction, matrix_reduction) else math.exp(value)
