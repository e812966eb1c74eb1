"""Which sample of a batch is read on which machine.

The batch is cut into partitions of equal length, and machines take whole partitions, as many each. Partitions read
parts of every domain that have no sample in common, so each machine needs its own shards only. Which partition a sample
belongs to depends on nothing but the batch's number, so runs go on with another number of machines.
"""

import heapq
from collections import Counter
from collections.abc import Sequence


class Partitions:
    """Deals the samples of batches to partitions so that each partition keeps even shares of every domain.

    Attributes:
        counts: samples dealt so far, by domain and partition. They differ between the partitions of a domain by a few.
    """

    def __init__(self, domains: int, partitions: int) -> None:
        """Start before the first batch."""
        self.counts = [[0] * partitions for _ in range(domains)]

    def deal(self, batch: Sequence[int]) -> list[tuple[int, int, int]]:
        """Give every sample of a batch its place.

        The partition that is furthest behind its share of a domain takes a sample of it, the furthest of all first.

        Args:
            batch: how many samples of each domain it holds; as many in all as are left by a whole number of partitions.

        Returns:
            (domain, partition, number of the sample within the domain's partition), partition by partition, domains
            spread evenly in each.
        """
        partitions = len(self.counts[0])
        left, room = list(batch), [sum(batch) // partitions] * partitions
        due = [sum(counts) + samples for counts, samples in zip(self.counts, batch, strict=True)]
        behind = [
            (counts[partition] * partitions - due[domain], domain, partition)
            for domain, counts in enumerate(self.counts)
            if left[domain]
            for partition in range(partitions)
        ]
        heapq.heapify(behind)
        dealt: list[list[tuple[int, int, int]]] = [[] for _ in range(partitions)]
        while behind:
            owed, domain, partition = behind[0]
            if not left[domain] or not room[partition]:
                heapq.heappop(behind)
                continue
            dealt[partition].append((domain, partition, self.counts[domain][partition]))
            self.counts[domain][partition] += 1
            left[domain] -= 1
            room[partition] -= 1
            heapq.heapreplace(behind, (owed + partitions, domain, partition))
        return [sample for partition in dealt for sample in _spread(partition)]


def _spread(samples: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """A partition's samples, those of each domain spread over its whole length, so that ranks get equal mixes."""
    size = Counter(domain for domain, _, _ in samples)
    seen: Counter[int] = Counter()
    keys = []
    for domain, _, _ in samples:
        keys.append((2 * seen[domain] + 1) / size[domain])
        seen[domain] += 1
    return [samples[place] for place in sorted(range(len(samples)), key=keys.__getitem__)]
