"""Linear maps by least squares, fitted on some tokens and tried on others.

A fit says nothing of tokens that it has not seen: with too few of them it reproduces their noise.
"""

import math

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # that are tried, over the mean square of what is read
FITTED = 0.75  # share of the samples that maps are fitted on; they are tried on the rest
LEAST = 2  # tokens to fit on, over what a map reads


def samples_fitted(samples: int) -> int:
    """How many of so many samples are fitted on."""
    return max(int(FITTED * samples), 1)


def samples_for(fitted: int) -> int:
    """How many samples there must be so that so many are fitted on, and some are left to try on."""
    return max(math.ceil(fitted / FITTED), 2)


def least_squares(xx: Tensor, xy: Tensor, ridge: float) -> Tensor:
    """The map W, [inputs, outputs], with the least ‖XW − Y‖² + ridge · mean(diag XᵀX) · ‖W‖².

    Args:
        xx: XᵀX, [inputs, inputs].
        xy: XᵀY, [inputs, outputs].
        ridge: no unit.
    """
    penalty = ridge * xx.diagonal().mean().clamp(min=1e-30)
    return torch.linalg.solve(xx + penalty * torch.eye(len(xx), dtype=xx.dtype, device=xx.device), xy)
