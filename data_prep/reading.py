"""The documents of a job, in batches, and the sets and splits that each belongs to."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from data_prep.encode import Batch
from data_prep.join import Encoded
from data_prep.packer import Arrival
from data_prep.recipe import PackSettings
from data_prep.split import rank_of, set_of, split_of
from llmprune.data.format import EVAL, TRAIN
from llmprune.data.records import Input
from llmprune.data.sources import BadRecord, Document, DomainNames, Fields, Place, Render, documents

_BATCH_CHARACTERS = 250_000  # small, so that no process is idle for long while the last batches finish
EARLY_STOP = 100  # number of bad records after which their share is checked during reading


class Reading:
    """Reads the documents of a job and decides the sets and the split of each.

    Attributes:
        inputs: all inputs; those for evaluation are first.
        training: inputs that are not for evaluation.
        fields: names of the records' fields.
        settings: settings of the job.
        names: names of the domains found so far.
    """

    def __init__(
        self,
        held_out: list[Input],
        training: list[Input],
        settings: PackSettings,
        fields: Fields,
        render: Render | None,
    ) -> None:
        self.inputs, self.training, self.fields = [*held_out, *training], training, fields
        self.settings, self._render = settings, render
        self._left_out: set[int] = set()
        self.names = DomainNames()

    def leave_out(self, held_out: list[Input]) -> None:
        """Leave the texts of these inputs out of training."""
        for item in self._documents(held_out, (0, 0)):
            if isinstance(item, Document) and item.text.strip():
                self._left_out.add(rank_of(item.text, self.settings.seed))

    def _documents(self, inputs: list[Input], after: Place) -> Iterator[Document | BadRecord]:
        rendered = self.settings.conversations.fields if self.settings.conversations else ()
        return documents(
            inputs, self.fields, after=after, render=self._render, rendered=rendered, names=self.names, empty=True
        )

    def batches(self, after: Place) -> Iterator[Batch]:
        """Yield batches of the documents and bad records after a position."""
        batch, characters = Batch(place=after), 0
        for item in self._documents(self.inputs, after):
            if isinstance(item, BadRecord):
                batch.bad.append(item)
                batch.place = item.after
            else:
                batch.place, batch.position = item.place, item.position
                if item.text.strip():
                    batch.documents.append(item)
                    characters += len(item.text)
                else:
                    batch.empty[item.domain, EVAL if self._is_held_out(item) else TRAIN] += 1
            if characters >= _BATCH_CHARACTERS or len(batch.bad) > EARLY_STOP:
                yield batch
                batch, characters = Batch(place=batch.place, position=batch.position), 0
        yield batch

    def _is_held_out(self, document: Document) -> bool:
        return document.place[0] < len(self.inputs) - len(self.training)

    def sort(self, document: Document, content: Encoded) -> Iterator[tuple[str, Arrival | None]]:
        """Yield the sets of a document, each with the document to pack, or None if it is left out of the set."""
        settings = self.settings
        rank = rank_of(document.text, settings.seed)
        evaluation = self._is_held_out(document)
        sets: Iterable[str] = settings.sets or ("",)
        if settings.sets and not evaluation and split_of(rank, settings.eval_fraction, {}) != EVAL:
            sets = filter(None, [set_of(rank, settings.eval_fraction, settings.sets)])
        for name in sets:
            left_out = not evaluation and rank in self._left_out
            yield name, None if left_out else Arrival(document.domain, rank, content, evaluation)


def part_of(inputs: list[Input], shard: tuple[int, int] | None) -> list[Input]:
    """The inputs of a part: every n-th file, and the n-th part of each dataset."""
    if shard is None:
        return inputs
    files = [source for source in inputs if not source.is_dataset]
    return [*files[shard[0] :: shard[1]], *(replace(source, part=shard) for source in inputs if source.is_dataset)]
