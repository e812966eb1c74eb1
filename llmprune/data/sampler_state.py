"""The state of the sampler: the sample in every slot of every batch, and the machine that reads it."""

import heapq
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.data.mixing import Mixer
from llmprune.utils.errors import UserError


class SamplerState:
    """The sampler, which computes (domain, partition, number within the domain's partition) of every slot of a batch.

    Every process that starts from the same state and gets the same changes computes the same sequence.

    Attributes:
        mixer: mixer of the domains.
        ahead: future changes of weights, (slot, weights), by ascending slot.
    """

    def __init__(self, weights: Sequence[int], batch_size: int, partitions: int = 1) -> None:
        """Start before the first batch; ``weights`` as from ``integer_weights``; ``partitions`` divides the batch."""
        self.mixer = Mixer(weights)
        self.ahead: deque[tuple[int, list[int]]] = deque()
        self._batch = batch_size
        self._partitions = Partitions(len(weights), partitions) if partitions > 1 else None

    def next_batch(self) -> list[tuple[int, int, int]]:
        """Advance by one batch and return its slots."""
        while self.ahead and self.ahead[0][0] <= self.mixer.slot:
            self.mixer.change(self.ahead.popleft()[1])
        taken = [self.mixer.next() for _ in range(self._batch)]
        if self._partitions is None:
            return [(domain, 0, number) for domain, number in taken]
        counts = [0] * len(self.mixer.weights)
        for domain, _ in taken:
            counts[domain] += 1
        return self._partitions.deal(counts)

    def state(self) -> dict[str, Any]:
        """The position of the sampler, in plain types only; its size does not grow with the run."""
        return {
            "mixer": self.mixer.state(),
            "partitions": None if self._partitions is None else [[*counts] for counts in self._partitions.counts],
            "ahead": [[slot, [*weights]] for slot, weights in self.ahead],
        }

    @classmethod
    def at(cls, state: Mapping[str, Any], batch_size: int, partitions: int = 1) -> "SamplerState":
        """The sampler that resumes from a saved state.

        Raises:
            UserError: the state is of another number of partitions, or of another version.
        """
        if not {"mixer", "partitions", "ahead"} <= state.keys():
            raise UserError("the checkpoint's place in the data is of another version: start the run anew")
        before = 1 if state["partitions"] is None else len(state["partitions"][0])
        if before != partitions:
            raise UserError(
                f"data.partitions is {partitions}, but the run began with {before}: a run keeps its partitions"
            )
        sampler_state = cls(state["mixer"]["weights"], batch_size, partitions)
        sampler_state.mixer = Mixer.at(state["mixer"])
        if sampler_state._partitions is not None:
            sampler_state._partitions.counts = [[*counts] for counts in state["partitions"]]
        sampler_state.ahead = deque((slot, [*weights]) for slot, weights in state["ahead"])
        return sampler_state


class Partitions:
    """Assigns the samples of batches to partitions so that each partition gets equal shares of every domain.

    Attributes:
        counts: number of samples assigned so far, by domain and partition; the partitions of a domain differ by a few.
    """

    def __init__(self, domains: int, partitions: int) -> None:
        """Start before the first batch."""
        self.counts = [[0] * partitions for _ in range(domains)]

    def deal(self, batch: Sequence[int]) -> list[tuple[int, int, int]]:
        """Assign every sample of a batch to a partition.

        A sample of a domain is assigned to the partition whose count is the furthest below its share of the domain; the
        largest differences are served first.

        Args:
            batch: number of samples of each domain in the batch; the sum is a multiple of the number of partitions.

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
    """A partition's samples, with those of each domain spread over the whole length, so that ranks get equal mixes."""
    size = Counter(domain for domain, _, _ in samples)
    seen: Counter[int] = Counter()
    keys = []
    for domain, _, _ in samples:
        keys.append((2 * seen[domain] + 1) / size[domain])
        seen[domain] += 1
    return [samples[place] for place in sorted(range(len(samples)), key=keys.__getitem__)]
