"""Which sample of a batch is read on which machine.

The batch is cut into lanes of equal length, and machines take whole lanes, as many each. Lanes read parts of every
domain that have no sample in common, so each machine needs its own shards only. Which lane a sample belongs to depends
on nothing but the batch's number, so runs go on with another number of machines.
"""

import heapq
from collections import Counter
from collections.abc import Sequence


class Lanes:
    """Deals the samples of batches to lanes so that each lane keeps even shares of every domain.

    Attributes:
        counts: samples dealt so far, by domain and lane. They differ between the lanes of a domain by a few.
    """

    def __init__(self, domains: int, lanes: int) -> None:
        """Start before the first batch."""
        self.counts = [[0] * lanes for _ in range(domains)]

    def deal(self, batch: Sequence[int]) -> list[tuple[int, int, int]]:
        """Give every sample of a batch its place.

        The lane that is furthest behind its share of a domain takes a sample of it, the furthest of all first.

        Args:
            batch: how many samples of each domain it holds; as many in all as are left by a whole number of lanes.

        Returns:
            (domain, lane, number of the sample within the domain's lane), lane by lane, domains spread evenly in each.
        """
        lanes = len(self.counts[0])
        left, room = list(batch), [sum(batch) // lanes] * lanes
        due = [sum(counts) + samples for counts, samples in zip(self.counts, batch, strict=True)]
        behind = [
            (counts[lane] * lanes - due[domain], domain, lane)
            for domain, counts in enumerate(self.counts)
            if left[domain]
            for lane in range(lanes)
        ]
        heapq.heapify(behind)
        dealt: list[list[tuple[int, int, int]]] = [[] for _ in range(lanes)]
        while behind:
            owed, domain, lane = behind[0]
            if not left[domain] or not room[lane]:
                heapq.heappop(behind)
                continue
            dealt[lane].append((domain, lane, self.counts[domain][lane]))
            self.counts[domain][lane] += 1
            left[domain] -= 1
            room[lane] -= 1
            heapq.heapreplace(behind, (owed + lanes, domain, lane))
        return [sample for lane in dealt for sample in _spread(lane)]


def _spread(samples: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """A lane's samples, those of each domain spread over its whole length, so that ranks get equal mixes."""
    size = Counter(domain for domain, _, _ in samples)
    seen: Counter[int] = Counter()
    keys = []
    for domain, _, _ in samples:
        keys.append((2 * seen[domain] + 1) / size[domain])
        seen[domain] += 1
    return [samples[place] for place in sorted(range(len(samples)), key=keys.__getitem__)]
