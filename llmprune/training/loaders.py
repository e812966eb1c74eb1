"""Data loaders of a run: its training stream and its evaluation samples."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset, default_collate

from llmprune.config.schema import Config
from llmprune.data.dataset import EvalDataset, MixedDataset
from llmprune.data.format import EVAL
from llmprune.data.prepared import PreparedData
from llmprune.data.weight_updates import DynamicLoadingConfig, first_weights
from llmprune.models.causal_lm import Batch
from llmprune.utils.processes import outlast_one_termination


def make_stream(
    config: Config, data: PreparedData, *, rank: int | None = None, world_size: int | None = None
) -> MixedDataset:
    """The training stream of this rank, or of rank ``rank`` of ``world_size`` ranks."""
    world_size = world_size or dist.get_world_size()
    starting = None
    if (dynamic := config.section(DynamicLoadingConfig)) is not None:
        starting = first_weights(dynamic, sorted(data.manifest.domains))
    return MixedDataset(
        data,
        global_batch_size=config.samples_per_step,
        weights=config.data.weights if starting is None else starting,
        seed=config.run.seed,
        rank=dist.get_global_rank() if rank is None else rank,
        world_size=world_size,
        machines=max(1, world_size // dist.get_local_world_size()),
        partitions=config.data.partitions,
        shuffle_window=config.data.shuffle_window,
        boundaries=config.data.document_boundaries,
    )


def make_loaders(
    config: Config, data: PreparedData, instead: Dataset[Any] | None = None
) -> tuple[MixedDataset, DataLoader[Any], EvalDataset | None]:
    """Make this rank's training stream, its data loader, and the evaluation samples, if there are any.

    Args:
        config: config of the job.
        data: prepared data that the job trains on.
        instead: dataset that the loader reads instead of the stream.
    """
    stream = make_stream(config, data)
    loader: DataLoader[Any] = DataLoader(
        stream if instead is None else instead,
        batch_size=config.samples_per_step // dist.get_world_size(),
        num_workers=config.data.workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=config.data.workers > 0,
        prefetch_factor=config.data.prefetch if config.data.workers else None,
        worker_init_fn=outlast_one_termination,
    )
    evaluation = None
    if data.domains_with(EVAL):
        evaluation = EvalDataset(data, config.data.eval_samples_per_domain, boundaries=config.data.document_boundaries)
    return stream, loader, evaluation


def first_batches(config: Config, data: PreparedData, samples: int, *, of_machine: bool = False) -> Iterator[Batch]:
    """This rank's share of the first ``samples`` samples of the training stream, in microbatches.

    With ``of_machine``, the ranks of each machine share all of the samples. Each batch also contains ``slot``, the
    samples' positions in the stream, int64 [batch].
    """
    ranks = dist.get_local_world_size() if of_machine else dist.get_world_size()
    rank = dist.get_local_rank() if of_machine else dist.get_global_rank()
    per_rank = config.samples_per_step // ranks
    stream = enumerate(islice(make_stream(config, data, rank=rank, world_size=ranks), -(-samples // ranks)))
    own = ({**one, "slot": number + (number // per_rank * (ranks - 1) + rank) * per_rank} for number, one in stream)
    size = 1 if config.train.microbatch_size == "auto" else int(config.train.microbatch_size)
    while batch := list(islice(own, size)):
        yield default_collate(batch)


def eval_loader(dataset: EvalDataset, batch_size: int) -> DataLoader[Any]:
    """Data loader of this rank's evaluation samples."""
    sampler = dist.get_sampler(dataset, shuffle=False)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler)
