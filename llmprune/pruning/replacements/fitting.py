"""Replacement modules computed from hidden states: the sums that they are fitted on, and their losses."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Map:
    """An affine map whose output is added to the residual stream: xW + b of the module's input x; None = nothing.

    Attributes:
        weight: matrix W, float64 [hidden, hidden].
        bias: vector b, float64 [hidden].
    """

    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Sums:
    """Sums over tokens, float64, of a replacement module's input X and of the update Y that it should add.

    Attributes:
        tokens: number of tokens.
        x: sum of X, [hidden].
        y: sum of Y, [hidden].
        xx: sum of XᵀX, [hidden, hidden].
        xy: sum of XᵀY, [hidden, hidden].
        yy: sum of ‖Y‖², a number.
    """

    tokens: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def empty(cls, hidden: int, device: torch.device) -> "Sums":
        """Sums over no tokens."""
        shapes: tuple[tuple[int, ...], ...] = ((), (hidden,), (hidden,), (hidden, hidden), (hidden, hidden), ())
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, read: Tensor, wanted: Tensor) -> None:
        """Add inputs and wanted updates of the residual stream, [tokens, hidden] both."""
        x, y = read.double(), wanted.double()  # float32 would lose half of its digits in the products
        self.tokens.add_(len(x))
        self.x.add_(x.sum(0))
        self.y.add_(y.sum(0))
        self.xx.add_(x.T @ x)
        self.xy.add_(x.T @ y)
        self.yy.add_(y.square().sum())

    def each(self) -> list[Tensor]:
        """All sums, in the order of the attributes."""
        return [self.tokens, self.x, self.y, self.xx, self.xy, self.yy]

    def error(self, tried: Map) -> float:
        """Σ ‖Y − XW − b‖² over all tokens."""
        found = self.yy
        if tried.weight is not None:
            found = found - 2 * (tried.weight * self.xy).sum() + (tried.weight * (self.xx @ tried.weight)).sum()
        if tried.bias is not None:
            found = found - 2 * tried.bias @ self.y + self.tokens * tried.bias.square().sum()
        if tried.weight is not None and tried.bias is not None:
            found = found + 2 * (self.x @ tried.weight) @ tried.bias
        return float(found)


def best_map(ways: Sequence[Map], tried: Sums) -> Map:
    """The map with the lowest error on tokens that no map was fitted on; an empty map if none is better."""
    errors = [error if math.isfinite(error := tried.error(way)) else math.inf for way in (Map(), *ways)]
    place = errors.index(min(errors))
    share, chosen = errors[place] / errors[0] if errors[0] else 0.0, f"map {place}" if place else "nothing"
    log.info("%s is the best of %d maps: it leaves %.4f of what the span adds", chosen, len(ways), share)
    return ways[place - 1] if place else Map()


@dataclass(frozen=True)
class FittedLosses:
    """Losses, in nats per token, on tokens that a replacement module was not fitted on.

    Attributes:
        source: loss of the whole source model.
        nothing: loss of the model with no module in the span's place.
        fitted: loss of the model with the replacement module.
    """

    source: float
    nothing: float
    fitted: float

    @property
    def helps(self) -> bool:
        """Whether the replacement module is better than no module."""
        return self.fitted < self.nothing

    def __str__(self) -> str:
        return f"loss {self.fitted:.4f}, {self.nothing:.4f} with nothing in its place, {self.source:.4f} of the source"
