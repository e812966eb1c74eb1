"""The course of a run: which sample every slot of every batch holds."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from llmprune.data.mixing import Mixer
from llmprune.data.partitions import Lanes
from llmprune.utils.errors import UserError


class Course:
    """Batch by batch, (domain, lane, number within the domain's lane) of every slot.

    Every process that starts from the same state and hears of the same changes computes the same course.

    Attributes:
        mixer: of domains.
        ahead: changes of weights to come, (slot, weights), by rising slot.
    """

    def __init__(self, weights: Sequence[int], batch_size: int, lanes: int = 1) -> None:
        """Start before the first batch; ``weights`` as from ``integer_weights``, ``lanes`` a divisor of the batch."""
        self.mixer = Mixer(weights)
        self.ahead: deque[tuple[int, list[int]]] = deque()
        self._batch = batch_size
        self._lanes = Lanes(len(weights), lanes) if lanes > 1 else None

    def next_batch(self) -> list[tuple[int, int, int]]:
        """Go on by one batch."""
        while self.ahead and self.ahead[0][0] <= self.mixer.slot:
            self.mixer.change(self.ahead.popleft()[1])
        taken = [self.mixer.next() for _ in range(self._batch)]
        if self._lanes is None:
            return [(domain, 0, number) for domain, number in taken]
        counts = [0] * len(self.mixer.weights)
        for domain, _ in taken:
            counts[domain] += 1
        return self._lanes.deal(counts)

    def state(self) -> dict[str, Any]:
        """Where the course stands: of the same length whatever lies behind, plain types only."""
        return {
            "mixer": self.mixer.state(),
            "lanes": None if self._lanes is None else [[*counts] for counts in self._lanes.counts],
            "ahead": [[slot, [*weights]] for slot, weights in self.ahead],
        }

    @classmethod
    def at(cls, state: Mapping[str, Any], batch_size: int, lanes: int = 1) -> "Course":
        """The course that goes on from a saved state.

        Raises:
            UserError: the state is of another number of lanes, or of another version.
        """
        if not {"mixer", "lanes", "ahead"} <= state.keys():
            raise UserError("the checkpoint's place in the data is of another version: start the run anew")
        before = 1 if state["lanes"] is None else len(state["lanes"][0])
        if before != lanes:
            raise UserError(f"data.lanes is {lanes}, but the run began with {before}: a run keeps its lanes")
        course = cls(state["mixer"]["weights"], batch_size, lanes)
        course.mixer = Mixer.at(state["mixer"])
        if course._lanes is not None:
            course._lanes.counts = [[*counts] for counts in state["lanes"]]
        course.ahead = deque((slot, [*weights]) for slot, weights in state["ahead"])
        return course
