"""Which domain each sample of the stream comes from: arithmetic, not chance.

Tijdeman's rule for the chairman assignment problem (Discrete Mathematics 32, 1980): every prefix of the stream holds,
of each domain, less than one sample more or fewer than its due share.
"""

from collections.abc import Iterator, Mapping, Sequence

PARTS = 1_000_000


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Weights in parts per million that sum to ``PARTS``, rounded by largest remainder.

    Args:
        weights: non-negative, not all zero; they need not sum to one.

    Raises:
        ValueError: a weight is negative or not finite, all are zero, or one is so small that it gets no part.
    """
    total = sum(weights)
    if not weights or not all(0 <= w < float("inf") for w in weights) or not 0 < total < float("inf"):
        raise ValueError(f"weights must be non-negative numbers, not all zero; got {list(weights)}")
    exact = [w / total * PARTS for w in weights]
    parts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: parts[i] - exact[i])
    for i in by_remainder[: PARTS - sum(parts)]:
        parts[i] += 1
    for weight, part in zip(weights, parts, strict=True):
        if weight and not part:
            raise ValueError(
                f"the weight {weight:g} of {total:g} in all would never be drawn, the smallest possible share is "
                f"{1 / PARTS:g}: raise it, or make it 0"
            )
    return parts


class Mixer:
    """The endless sequence of domains under constant weights, from any starting slot.

    At slot n (from 0), among the domains whose next sample may start by now, the one whose sample is due first is
    taken (ties: the lower number). All arithmetic is in whole numbers, so every process computes the same sequence.
    """

    def __init__(self, weights: Sequence[int]) -> None:
        """Start before the first slot.

        Args:
            weights: whole parts, as from ``integer_weights``; domains of weight zero are never taken.
        """
        self.weights = list(weights)
        self.total = sum(weights)
        self.counts = [0] * len(weights)
        self.slot = 0
        self._active = [i for i, w in enumerate(weights) if w]
        # Tijdeman's slack 1/(2k − 2), as a whole number of the doubled scale below.
        self._slack = max(2 * len(self._active) - 2, 1)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (domain, number of the sample within the domain) for every slot."""
        while True:
            yield self.next()

    def next(self) -> tuple[int, int]:
        """Take the next slot: (domain, number of the sample within the domain)."""
        slack, total = self._slack, self.total
        best, best_due = -1, (0, 1)
        for i in self._active:
            weight, count = self.weights[i], self.counts[i]
            # Eligible when weight/total·(slot + 1) − count ≥ 1/slack; due at (count + 1 − 1/slack)·total/weight.
            if weight * (self.slot + 1) * slack >= total * (count * slack + 1) or len(self._active) == 1:
                due = ((count + 1) * slack - 1, weight)
                if best < 0 or due[0] * best_due[1] < best_due[0] * due[1]:
                    best, best_due = i, due
        number = self.counts[best]
        self.counts[best] += 1
        self.slot += 1
        return best, number

    def skip(self, slots: int) -> None:
        """Move ``slots`` on, as if ``next`` had been called as often."""
        # The sequence repeats after ``total`` slots, in which each domain is taken exactly ``weight`` times.
        periods = slots // self.total
        self.slot += periods * self.total
        self.counts = [c + periods * w for c, w in zip(self.counts, self.weights, strict=True)]
        for _ in range(slots % self.total):
            self.next()


def domain_weights(domains: Sequence[str], weights: Mapping[str, float] | None, samples: Sequence[int]) -> list[int]:
    """Whole weights for ``domains``: as given by name, or in proportion to their samples."""
    if weights is not None:
        return integer_weights([weights.get(domain, 0.0) for domain in domains])
    least = sum(samples) / PARTS  # a tiny domain is still drawn
    return integer_weights([max(count, least) if count else 0 for count in samples])
