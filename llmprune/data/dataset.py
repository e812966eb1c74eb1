"""Prepared data as PyTorch data sets: an endless mixed stream for training, a fixed set for evaluation."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from llmprune.data.format import EVAL, TRAIN
from llmprune.data.mixing import PPM, domain_weights
from llmprune.data.order import domain_order
from llmprune.data.prepared import PreparedData
from llmprune.data.reader import Sample, SplitReader
from llmprune.data.sampler_state import SamplerState
from llmprune.data.weight_changes import WeightChanges
from llmprune.utils.errors import UserError


class MixedDataset(IterableDataset[Sample]):
    """The endless training stream over all domains, in proportions that may change between batches.

    Slot n of the stream is sample n of the global sequence, whatever the number of ranks and workers: each rank and
    worker computes its own slots without talking to anyone. It yields what ``SplitReader.read`` gives, and "domain",
    int64 []. The process that trains keeps a course of its own, with which it tells what has been read by any batch.
    """

    def __init__(
        self,
        data: PreparedData,
        *,
        global_batch_size: int,
        weights: Mapping[str, float] | None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        machines: int = 1,
        partitions: int = 1,
        shuffle_window: int = 8,
        boundaries: bool | None = None,
    ) -> None:
        """Open the training split of every domain.

        Args:
            data: prepared.
            global_batch_size: samples per batch over all ranks; a multiple of ``world_size`` and of ``partitions``.
            weights: share of each domain by name (absent = 0); None = in proportion to its samples.
            seed: of the order.
            rank: this process.
            world_size: number of processes.
            machines: that they run on, as many on each.
            partitions: disjoint parts of every domain. A multiple of the number of machines lets each read its own
                shards.
            shuffle_window: shards of a partition whose samples are shuffled together.
            boundaries: whether samples say where documents begin; None = those of conversations do.

        Raises:
            UserError: unknown domains, no weight, no data.
        """
        self.manifest = data.manifest
        self.domains = sorted(self.manifest.domains)
        self._batch, self._rank, self._world_size, self._partitions = global_batch_size, rank, world_size, partitions
        numbers = {domain: number for number, domain in enumerate(self.domains)}
        self._readers = {
            numbers[domain]: data.reader(domain, TRAIN, boundaries=boundaries) for domain in data.domains_with(TRAIN)
        }
        sizes = {domain: self.manifest.samples(domain, TRAIN) for domain in self.domains}
        parts = domain_weights(sizes, weights)
        for (domain, size), weight in zip(sizes.items(), parts, strict=True):
            if weight and size < partitions:
                raise UserError(
                    f"the domain '{domain}' has {size} training samples, not one for each of {partitions} partitions"
                )
        self._orders = {
            number: domain_order(reader.shard_sizes, seed, number, window=shuffle_window, partitions=partitions)
            for number, reader in self._readers.items()
        }
        data.check_room(sum(self._in_use(shuffle_window, machines, parts)))
        self._sampler_state = SamplerState(parts, global_batch_size, partitions)
        self._start = self._sampler_state.state()
        self._changes = WeightChanges(len(self.domains))

    def _in_use(self, window: int, machines: int, parts: Sequence[int]) -> Iterator[int]:
        """How many bytes of each domain's shards a machine uses at a time: those of a window and of the next."""
        partitions = -(-self._partitions // machines) + (self._partitions % machines > 0)
        for number, reader in self._readers.items():
            if parts[number]:
                yield sum(sorted(reader.shard_bytes)[-2 * window * partitions :])

    def __iter__(self) -> Iterator[Sample]:
        """Yield this rank's and this worker's samples, for ever."""
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        per_rank = self._batch // self._world_size
        own = slice(self._rank * per_rank, (self._rank + 1) * per_rank)
        sampler_state = SamplerState.at(self._start, self._batch, self._partitions)
        seen, batch = 0, 0
        while True:
            self._changes.reach(number, sampler_state.mixer.slot + self._batch)
            found = self._changes.since(seen)
            seen += len(found)
            sampler_state.ahead.extend(found)
            slots = sampler_state.next_batch()
            if batch % workers == number:
                for domain, partition, sample in slots[own]:
                    yield {**self._read(domain, partition, sample), "domain": torch.tensor(domain)}
            batch += 1

    def _read(self, domain: int, partition: int, number: int) -> Sample:
        reader, order = self._readers[domain], self._orders[domain][partition]
        before = order.place
        shard, index = order.locate(number)
        if order.place != before:
            reader.fetch_ahead(order.upcoming())
        return reader.read(shard, index)

    @property
    def weights(self) -> dict[str, float]:
        """The shares announced last, by domain."""
        parts = self._sampler_state.ahead[-1][1] if self._sampler_state.ahead else self._sampler_state.mixer.weights
        return {domain: part / PPM for domain, part in zip(self.domains, parts, strict=True)}

    def change_weights(self, weights: Sequence[int], batch: int) -> None:
        """Take other weights from a batch on; every rank must ask for the same.

        Args:
            weights: parts of a million by domain, as from ``integer_weights``.
            batch: the first with these weights, counted from 0 over the whole run; workers must not have begun it.

        Raises:
            ValueError: they have.
        """
        self._changes.add(batch * self._batch, weights)
        self._sampler_state.ahead.append((batch * self._batch, [*weights]))

    def samples_seen(self, batches: int) -> dict[str, int]:
        """How many samples of each domain the first ``batches`` batches of the run hold, over all ranks."""
        self._advance(batches * self._batch)
        return dict(zip(self.domains, self._sampler_state.mixer.counts, strict=True))

    def epochs_seen(self, batches: int) -> dict[str, float]:
        """How many times each domain has been gone through in them."""
        return {
            domain: seen / max(self.manifest.samples(domain, TRAIN), 1)
            for domain, seen in self.samples_seen(batches).items()
        }

    def _advance(self, slot: int) -> None:
        while self._sampler_state.mixer.slot < slot:
            self._sampler_state.next_batch()

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where the stream stands after ``num_samples`` samples over all ranks, and the changes announced for later.

        Composer calls this with the samples since the start of the run's only, endless epoch (``from_beginning``).
        """
        self._advance(num_samples)
        return self._sampler_state.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved place, on any number of ranks and workers."""
        self._sampler_state = SamplerState.at(state, self._batch, self._partitions)
        self._start = {**self._sampler_state.state(), "ahead": []}  # workers hear of changes as of any other
        for slot, weights in self._sampler_state.ahead:
            self._changes.add(slot, weights)


class EvalDataset(Dataset[Sample]):
    """The evaluation splits of all domains, one after the other."""

    def __init__(
        self, data: PreparedData, samples_per_domain: int | None = None, *, boundaries: bool | None = None
    ) -> None:
        """Open the evaluation split of every domain that has one.

        Args:
            data: prepared.
            samples_per_domain: take at most so many of each, evenly spaced.
            boundaries: whether samples say where documents begin; None = those of conversations do.

        Raises:
            UserError: no domain has an evaluation sample.
        """
        self.manifest = data.manifest
        self.domains = sorted(self.manifest.domains)
        self._readers: dict[int, SplitReader] = {}
        self._samples: list[tuple[int, int, int]] = []
        numbers = {domain: number for number, domain in enumerate(self.domains)}
        for domain in data.domains_with(EVAL):
            number = numbers[domain]
            reader = self._readers[number] = data.reader(domain, EVAL, boundaries=boundaries)
            places = [(number, shard, i) for shard, size in enumerate(reader.shard_sizes) for i in range(size)]
            take = min(samples_per_domain or len(places), len(places))
            self._samples += [places[i * len(places) // take] for i in range(take)]
        if not self._samples:
            raise UserError(f"{data.location} has no evaluation samples: prepare it with a larger --eval-fraction")

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
        return {**self._readers[domain].read(shard, index), "domain": torch.tensor(domain)}
