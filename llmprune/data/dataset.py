"""Prepared data as PyTorch data sets: an endless mixed stream for training, a fixed set for evaluation."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming.base.format import Reader
from streaming.base.hashing import get_hash
from streaming.base.stream import Stream
from streaming.base.world import World
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from llmprune.data.changes import WeightChanges
from llmprune.data.format import COLUMN, EVAL, TRAIN, DataManifest
from llmprune.data.mixing import PARTS, Mixer, domain_weights
from llmprune.data.order import DomainOrder
from llmprune.errors import UserError, nearest

Sample = dict[str, torch.Tensor]


class DomainReader:
    """Reads the samples of one split of one domain from its MDS shards."""

    def __init__(self, folder: Path, domain: str, split: str) -> None:
        """Open the split's index.

        Raises:
            UserError: the split is missing or damaged.
        """
        index = folder / domain / split / "index.json"
        if not index.is_file():
            raise UserError(f"{index} does not exist: the domain '{domain}' was moved or never prepared")
        self._stream = Stream(local=str(folder / domain), split=split)
        try:
            self._shards: list[Reader] = self._stream.get_shards(World.detect(), allow_unsafe_types=False)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} is damaged ({error}): prepare the data again") from None
        for shard in self._shards:
            for raw, _ in shard.file_pairs:
                path = folder / domain / split / raw.basename
                if not path.is_file() or path.stat().st_size != raw.bytes:
                    raise UserError(f"{path} is missing or cut short: prepare the data again")
        self.shard_sizes = [shard.samples for shard in self._shards]
        self._folder = folder / domain / split
        self._checked: set[int] = set()

    def read(self, shard: int, index: int) -> torch.Tensor:
        """The token ids of one sample, int64 [sequence length]. A shard's checksum is looked at when it is first read.

        Raises:
            UserError: the shard is damaged or has vanished.
        """
        try:
            if shard not in self._checked:
                self._check(shard)
            tokens = self._shards[shard].get_item(index)[COLUMN]
        except OSError as error:
            raise UserError(
                f"{error.filename or self._folder} can't be read any more ({error.strerror}): put the data back where "
                "the run began with it"
            ) from None
        return torch.from_numpy(np.asarray(tokens).astype(np.int64))

    def _check(self, shard: int) -> None:
        for raw, _ in self._shards[shard].file_pairs:
            path = self._folder / raw.basename
            content = path.read_bytes()
            for algorithm, wanted in raw.hashes.items():
                if get_hash(algorithm, content) != wanted:
                    raise UserError(
                        f"{path} is damaged (its {algorithm} is not that of the index): prepare the data again"
                    )
        self._checked.add(shard)


class MixedDataset(IterableDataset[Sample]):
    """The endless training stream over all domains, in proportions that may change between batches.

    Slot n of the stream is sample n of the global sequence, whatever the number of ranks and workers: each rank and
    worker computes its own slots without talking to anyone. It yields {"input_ids": int64 [sequence length], "domain":
    int64 []}. The process that trains keeps a mixer of its own, with which it tells what has been read by any batch.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        global_batch_size: int,
        weights: Mapping[str, float] | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle_window: int = 8,
    ) -> None:
        """Open the training split of every domain.

        Args:
            folder: prepared data.
            global_batch_size: samples per batch over all ranks; a multiple of ``world_size``.
            weights: share of each domain by name (absent = 0); None = in proportion to its samples.
            seed: of the order.
            rank: this process.
            world_size: number of processes.
            shuffle_window: shards whose samples are shuffled together.

        Raises:
            UserError: unknown domains, no weight, no data.
        """
        self.manifest = DataManifest.load(folder)
        self.domains = sorted(self.manifest.domains)
        check_domains(weights or {}, self.domains)
        self._batch, self._rank, self._world_size = global_batch_size, rank, world_size
        self._readers = [DomainReader(Path(folder), domain, TRAIN) for domain in self.domains]
        sizes = [sum(reader.shard_sizes) for reader in self._readers]
        try:
            parts = domain_weights(self.domains, weights, sizes)
        except ValueError as error:
            raise UserError(f"domain weights: {error}") from None
        for domain, size, weight in zip(self.domains, sizes, parts, strict=True):
            if weight and not size:
                raise UserError(f"the domain '{domain}' has no training samples: give it weight 0 or prepare more text")
        self._orders = [
            DomainOrder(reader.shard_sizes, seed, number, shuffle_window) for number, reader in enumerate(self._readers)
        ]
        self._mixer = Mixer(parts)
        self._start = self._mixer.state()
        self._changes = WeightChanges(len(self.domains))
        self._ahead: list[tuple[int, list[int]]] = []  # changes that the process's own mixer has not reached

    def __iter__(self) -> Iterator[Sample]:
        """Yield this rank's and this worker's samples, for ever."""
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        per_rank = self._batch // self._world_size
        mixer, seen, ahead = Mixer.at(self._start), 0, deque[tuple[int, list[int]]]()
        batch = 0
        while True:
            self._changes.reach(number, mixer.slot + self._batch)
            found = self._changes.since(seen)
            seen += len(found)
            ahead.extend(found)
            while ahead and ahead[0][0] <= mixer.slot:
                mixer.change(ahead.popleft()[1])
            slots = [mixer.next() for _ in range(self._batch)]
            if batch % workers == number:
                for domain, sample in slots[self._rank * per_rank : (self._rank + 1) * per_rank]:
                    shard, index = self._orders[domain].locate(sample)
                    yield {
                        "input_ids": self._readers[domain].read(shard, index),
                        "domain": torch.tensor(domain),
                    }
            batch += 1

    @property
    def weights(self) -> dict[str, float]:
        """The shares announced last, by domain."""
        parts = self._ahead[-1][1] if self._ahead else self._mixer.weights
        return {domain: part / PARTS for domain, part in zip(self.domains, parts, strict=True)}

    def change_weights(self, weights: Sequence[int], batch: int) -> None:
        """Take other weights from a batch on; every rank must ask for the same.

        Args:
            weights: parts of a million by domain, as from ``integer_weights``.
            batch: the first with these weights, counted from 0 over the whole run; workers must not have begun it.

        Raises:
            ValueError: they have.
        """
        self._changes.add(batch * self._batch, weights)
        self._ahead.append((batch * self._batch, [*weights]))

    def samples_seen(self, batches: int) -> dict[str, int]:
        """How many samples of each domain the first ``batches`` batches of the run hold, over all ranks."""
        self._advance(batches * self._batch)
        return dict(zip(self.domains, self._mixer.counts, strict=True))

    def epochs_seen(self, batches: int) -> dict[str, float]:
        """How many times each domain has been gone through in them."""
        seen = self.samples_seen(batches)
        return {
            domain: seen[domain] / max(order.samples, 1)
            for domain, order in zip(self.domains, self._orders, strict=True)
        }

    def _advance(self, slot: int) -> None:
        while self._mixer.slot < slot:
            while self._ahead and self._ahead[0][0] <= self._mixer.slot:
                self._mixer.change(self._ahead.pop(0)[1])
            self._mixer.next()

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where the stream stands after ``num_samples`` samples over all ranks, and the changes announced for later.

        Composer calls this with the samples since the start of the run's only, endless epoch (``from_beginning``).
        """
        self._advance(num_samples)
        return {"mixer": self._mixer.state(), "ahead": [[slot, weights] for slot, weights in self._ahead]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved place, on any number of ranks and workers."""
        self._start = dict(state["mixer"])
        self._mixer = Mixer.at(self._start)
        self._ahead = []
        for slot, weights in state["ahead"]:
            self._changes.add(slot, weights)
            self._ahead.append((slot, [*weights]))


class EvalDataset(Dataset[Sample]):
    """The evaluation splits of all domains, one after the other."""

    def __init__(self, folder: Path | str, samples_per_domain: int | None = None) -> None:
        """Open the evaluation split of every domain that has one.

        Args:
            folder: prepared data.
            samples_per_domain: take at most so many of each, evenly spaced.

        Raises:
            UserError: no domain has an evaluation sample.
        """
        self.manifest = DataManifest.load(folder)
        self.domains = sorted(self.manifest.domains)
        self._readers: dict[int, DomainReader] = {}
        self._samples: list[tuple[int, int, int]] = []
        for number, domain in enumerate(self.domains):
            if EVAL not in self.manifest.domains[domain] or not self.manifest.domains[domain][EVAL].samples:
                continue
            reader = self._readers[number] = DomainReader(Path(folder), domain, EVAL)
            places = [(number, shard, i) for shard, size in enumerate(reader.shard_sizes) for i in range(size)]
            take = min(samples_per_domain or len(places), len(places))
            self._samples += [places[i * len(places) // take] for i in range(take)]
        if not self._samples:
            raise UserError(f"{folder} has no evaluation samples: prepare it with a larger --eval-fraction")

    @property
    def domains_present(self) -> list[int]:
        """Numbers of the domains that have evaluation samples."""
        return sorted(self._readers)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._samples)

    def __getitem__(self, item: int) -> Sample:
        """One sample, as ``MixedDataset`` yields it."""
        domain, shard, index = self._samples[item]
        return {"input_ids": self._readers[domain].read(shard, index), "domain": torch.tensor(domain)}


def check_domains(weights: Mapping[str, float], domains: Sequence[str]) -> None:
    """Raise ``UserError`` if ``weights`` names a domain that the data does not have."""
    for name in weights:
        if name not in domains:
            raise UserError(
                f"data.weights names the domain '{name}', which the data does not have; {nearest(name, domains)}"
            )
