"""The domain of each sample of the stream, computed without randomness.

Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32, 1980): under constant weights, the number
of samples of each domain in every prefix of the stream differs from its due share by less than one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.utils.errors import UserError, nearest

PPM = 1_000_000  # weights are whole numbers of parts per million


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Weights in parts per million that sum to ``PPM``, rounded by largest remainder.

    Args:
        weights: weights of the domains, non-negative, not all zero; they need not sum to one.

    Raises:
        ValueError: a weight is negative or not finite, all are zero, or one is so small that it rounds to zero.
    """
    total = sum(weights)
    if not weights or not all(0 <= w < float("inf") for w in weights) or not 0 < total < float("inf"):
        raise ValueError(f"weights must be non-negative numbers, not all zero; got {list(weights)}")
    exact = [w / total * PPM for w in weights]
    parts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: parts[i] - exact[i])
    for i in by_remainder[: PPM - sum(parts)]:
        parts[i] += 1
    for weight, part in zip(weights, parts, strict=True):
        if weight and not part:
            raise ValueError(
                f"the weight {weight:g} of {total:g} in all would never be drawn, the smallest possible share is "
                f"{1 / PPM:g}: raise it, or make it 0"
            )
    return parts


class Mixer:
    """The endless sequence of domains, whose weights may change at any slot.

    At every slot, among the domains whose next sample may start by now, the one whose sample is due first is taken
    (ties: the lower number). When weights change, each domain keeps its owed share, so that no share is lost; the owed
    share of a domain whose weight becomes zero is given to the domain with the largest weight. All arithmetic is in
    whole numbers, so every process computes the same sequence.

    Attributes:
        weights: weights of the domains as whole numbers, whose sum never changes.
        slot: number of slots that have been taken.
        counts: number of slots taken by each domain.
        owed: due share minus count of each domain, in parts of a sample (``total`` parts = 1 sample).
    """

    def __init__(self, weights: Sequence[int]) -> None:
        """Start before the first slot.

        Args:
            weights: weights of the domains as whole numbers, as from ``integer_weights``; domains of weight zero are
                never taken.
        """
        self.total = sum(weights)
        self.slot = 0
        self.counts = [0] * len(weights)
        self.owed = [0] * len(weights)
        self.change(weights)

    def change(self, weights: Sequence[int]) -> None:
        """Change the weights from the next slot on.

        Raises:
            ValueError: the weights have another sum or number than before.
        """
        if sum(weights) != self.total or len(weights) != len(self.counts):
            raise ValueError(f"weights must be {len(self.counts)} parts that sum to {self.total}; got {list(weights)}")
        self.weights = list(weights)
        self._active = [i for i, w in enumerate(weights) if w]
        # Tijdeman's slack 1/(2k − 2), as a whole number.
        self._slack = max(2 * len(self._active) - 2, 1)
        heaviest = self.weights.index(max(self.weights))
        for i, weight in enumerate(self.weights):
            if not weight:
                self.owed[heaviest] += self.owed[i]
                self.owed[i] = 0

    def next(self) -> tuple[int, int]:
        """Take the next slot and return (domain, number of the sample within the domain)."""
        slack, total, weights, owed = self._slack, self.total, self.weights, self.owed
        best, best_due, best_weight = -1, 0, 1
        for i in self._active:
            weight, before = weights[i], owed[i]
            owed[i] = now = before + weight
            # Eligible when at least 1/slack of a sample is owed; due when 1 − 1/slack will be.
            if now * slack >= total:
                due = total * (slack - 1) - before * slack
                if best < 0 or due * best_weight < best_due * weight:
                    best, best_due, best_weight = i, due, weight
        number = self.counts[best]
        self.counts[best] += 1
        owed[best] -= total
        self.slot += 1
        return best, number

    def state(self) -> dict[str, Any]:
        """The position of the sequence; its size depends only on the number of domains."""
        return {"slot": self.slot, "weights": [*self.weights], "counts": [*self.counts], "owed": [*self.owed]}

    @classmethod
    def at(cls, state: Mapping[str, Any]) -> "Mixer":
        """A mixer that resumes from a saved state."""
        mixer = cls(state["weights"])
        mixer.slot, mixer.counts, mixer.owed = state["slot"], [*state["counts"]], [*state["owed"]]
        return mixer


def domain_weights(samples: Mapping[str, int], weights: Mapping[str, float] | None) -> list[int]:
    """The weights of domains in parts per million.

    Args:
        samples: number of training samples of every domain, by name.
        weights: weight of each domain by name (absent = 0); None = in proportion to the number of its samples.

    Raises:
        UserError: a domain is unknown, values are no weights, or a domain without samples has a weight.
    """
    least = sum(samples.values()) / PPM  # so that even a tiny domain is drawn
    if weights is None:
        weights = {domain: max(count, least) if count else 0 for domain, count in samples.items()}
    for name in weights:
        if name not in samples:
            raise UserError(
                f"data.weights names the domain '{name}', which the data does not have; {nearest(name, samples)}"
            )
    try:
        parts = integer_weights([weights.get(domain, 0.0) for domain in samples])
    except (ValueError, TypeError) as error:
        raise UserError(f"data.weights: {error}") from None
    for (domain, count), part in zip(samples.items(), parts, strict=True):
        if part and not count:
            raise UserError(f"the domain '{domain}' has no training samples: give it weight 0 or prepare more text")
    return parts
