"""Linear maps by least squares, fitted on some tokens and tested on others.

The error on the fitted tokens is no measure of quality: with too few tokens, a fit reproduces their noise.
"""

import math

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # values that are tried, relative to the mean square of the inputs
FITTED = 0.75  # share of the samples that maps are fitted on; the rest tests them
LEAST = 2  # fewest tokens to fit on, as a multiple of a map's inputs


def samples_fitted(samples: int) -> int:
    """The number of samples out of ``samples`` that maps are fitted on."""
    return max(int(FITTED * samples), 1)


def samples_for(fitted: int) -> int:
    """The number of samples needed so that ``fitted`` of them are fitted on and at least one tests the maps."""
    return max(math.ceil(fitted / FITTED), 2)


def least_squares(xx: Tensor, xy: Tensor, ridge: float) -> Tensor:
    """The map W, [inputs, outputs], that minimises ‖XW − Y‖² + ridge · mean(diag XᵀX) · ‖W‖².

    Args:
        xx: XᵀX, [inputs, inputs].
        xy: XᵀY, [inputs, outputs].
        ridge: strength of the ridge penalty (no unit).
    """
    penalty = ridge * xx.diagonal().mean().clamp(min=1e-30)
    return torch.linalg.solve(xx + penalty * torch.eye(len(xx), dtype=xx.dtype, device=xx.device), xy)
