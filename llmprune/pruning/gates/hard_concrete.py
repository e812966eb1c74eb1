"""The hard concrete distribution: differentiable gates that are exactly zero or one part of the time.

Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization" (arXiv:1712.01312), with the
constants of Sheared-LLaMA (arXiv:2310.06694). Every function is elementwise and keeps shape and dtype.
"""

import math

import torch
from torch import Tensor

BETA = 2 / 3  # temperature
LOWER, UPPER = -0.1, 1.1  # interval of the stretched concrete variable before it is clamped to [0, 1]
EPSILON = 1e-6
LOG_ALPHA_START = 5.0
LOG_ALPHA_SPREAD = 0.01
LOG_ALPHA_LIMIT = math.log(100)
SOFT_SLOPE = 0.8  # slope of the gate used in evaluation

_ZERO_POINT = BETA * math.log(-LOWER / UPPER)


def sample(log_alpha: Tensor, noise: Tensor) -> Tensor:
    """A random sample of the gates: z = clamp(1.2·s − 0.1, 0, 1), s = σ((logit u + log α) / β).

    Args:
        log_alpha: location parameters log α, of any shape.
        noise: random numbers u, uniform on (0, 1), of the same shape.
    """
    concrete = torch.sigmoid((torch.logit(noise, eps=EPSILON) + log_alpha) / BETA)
    return (concrete * (UPPER - LOWER) + LOWER).clamp(0, 1)


def keep_probability(log_alpha: Tensor) -> Tensor:
    """P(z > 0) = 1 − σ(β · logit(0.1/1.2) − log α), kept within [ε, 1 − ε]."""
    return torch.sigmoid(log_alpha - _ZERO_POINT).clamp(EPSILON, 1 - EPSILON)


def deterministic(log_alpha: Tensor, zeros: Tensor | int) -> Tensor:
    """The gates used in evaluation: σ(0.8 · log α / β), with the lowest set to zero.

    Args:
        log_alpha: location parameters log α, [..., n].
        zeros: number of zeros among the n gates, one number for all rows or one for each row [...].

    Returns:
        The gates, [..., n]; among equal values, those with lower indices become zero first.
    """
    soft = torch.sigmoid(log_alpha * (SOFT_SLOPE / BETA))
    rank = log_alpha.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    count = torch.as_tensor(zeros, device=log_alpha.device).unsqueeze(-1)
    return torch.where(rank < count, torch.zeros_like(soft), soft)
