"""From the elements of a block's weights to one number.

A matrix is first summed along its rows (the weight of a norm: each element is a row), then its rows are reduced to one
number, then the block's matrices are. Everything is computed in logarithms, so that products neither overflow nor
vanish; with ``prod`` in either place the score stays a logarithm, which keeps the order.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# From logarithms to the logarithm of what the name says.
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda logs: logs.logsumexp(0),
    "mean": lambda logs: logs.logsumexp(0) - math.log(len(logs)),
    "max": lambda logs: logs.amax(0),
    "prod": lambda logs: logs.sum(0),
}
_SMALLEST = 1e-300


def reduce_block(rows: Sequence[Tensor], row_reduction: str, matrix_reduction: str) -> float:
    """The score of a block.

    Args:
        rows: of every matrix, the sums along its rows (not negative), [rows].
        row_reduction: over the rows of a matrix: sum, mean, max or prod.
        matrix_reduction: over the block's matrices.
    """
    matrices = [REDUCTIONS[row_reduction](sums.double().clamp(min=_SMALLEST).log()) for sums in rows]
    value = REDUCTIONS[matrix_reduction](torch.stack(matrices)).item()
    return value if "prod" in (row_reduction, matrix_reduction) else math.exp(value)
