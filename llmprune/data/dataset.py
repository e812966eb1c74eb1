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

    Slot n of the stream is sample n of the global sequence, for any number of ranks and workers: each rank and worker
    computes its own slots without communication. Each sample has the entries of ``SplitReader.read``, and "domain",
    int64 []. The training process has its own sampler state, with which it computes what has been read by any batch.
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
            data: prepared data.
            global_batch_size: number of samples per batch over all ranks; a multiple of ``world_size`` and of
                ``partitions``.
            weights: share of each domain by name (absent = 0); None = in proportion to the number of its samples.
            seed: seed of the order of samples.
            rank: number of this process.
            world_size: number of processes.
            machines: number of machines, each with the same number of processes.
            partitions: number of disjoint parts that every domain is split into. If it is a multiple of the number of
                machines, each machine reads only its own shards.
            shuffle_window: number of shards of a partition whose samples are shuffled together.
            boundaries: whether samples contain the positions within documents; None = true for conversations, else
                false.

        Raises:
            UserError: a domain is unknown, there is no weight, or there are no data.
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
        """The bytes of each domain's shards that a machine uses at a time: those of the current window and the next."""
        partitions = -(-self._partitions // machines) + (self._partitions % machines > 0)
        for number, reader in self._readers.items():
            if parts[number]:
                yield sum(sorted(reader.shard_bytes)[-2 * window * partitions :])

    def __iter__(self) -> Iterator[Sample]:
        """Yield this rank's and this worker's samples endlessly."""
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
        """The weights that were set last, by domain."""
        parts = self._sampler_state.ahead[-1][1] if self._sampler_state.ahead else self._sampler_state.mixer.weights
        return {domain: part / PPM for domain, part in zip(self.domains, parts, strict=True)}

    def change_weights(self, weights: Sequence[int], batch: int) -> None:
        """Change the weights from a batch on; every rank must make the same call.

        Args:
            weights: weights of the domains in parts per million, as from ``integer_weights``.
            batch: number of the first batch with these weights, counted from 0 over the whole run; workers must not
                have begun it.

        Raises:
            ValueError: a worker has begun the batch.
        """
        self._changes.add(batch * self._batch, weights)
        self._sampler_state.ahead.append((batch * self._batch, [*weights]))

    def samples_seen(self, batches: int) -> dict[str, int]:
        """The number of samples of each domain in the run's first ``batches`` batches, over all ranks."""
        self._advance(batches * self._batch)
        return dict(zip(self.domains, self._sampler_state.mixer.counts, strict=True))

    def epochs_seen(self, batches: int) -> dict[str, float]:
        """The number of epochs of each domain in the run's first ``batches`` batches."""
        return {
            domain: seen / max(self.manifest.samples(domain, TRAIN), 1)
            for domain, seen in self.samples_seen(batches).items()
        }

    def _advance(self, slot: int) -> None:
        while self._sampler_state.mixer.slot < slot:
            self._sampler_state.next_batch()

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """The position of the stream after ``num_samples`` samples over all ranks, with changes of later weights.

        Composer calls this with the samples since the start of the run's only, endless epoch (``from_beginning``).
        """
        self._advance(num_samples)
        return self._sampler_state.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved position, on any number of ranks and workers."""
        self._sampler_state = SamplerState.at(state, self._batch, self._partitions)
        self._start = {**self._sampler_state.state(), "ahead": []}  # workers get these changes like any others
        for slot, weights in self._sampler_state.ahead:
            self._changes.add(slot, weights)


class EvalDataset(Dataset[Sample]):
    """The evaluation splits of all domains, one after the other."""

    def __init__(
        self, data: PreparedData, samples_per_domain: int | None = None, *, boundaries: bool | None = None
    ) -> None:
        """Open the evaluation split of every domain that has one.

        Args:
            data: prepared data.
            samples_per_domain: largest number of samples of each domain, taken at even intervals; None = all.
            boundaries: whether samples contain the positions within documents; None = true for conversations, else
                false.

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
        """The number of samples."""
        return len(self._samples)

    def __getitem__(self, item: int) -> Sample:
        """One sample, with the same entries as those of ``MixedDataset``."""
        domain, shard, index = self._samples[item]
        return {**self._readers[domain].read(shard, index), "domain": torch.tensor(domain)}
