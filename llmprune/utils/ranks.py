"""Functions for the ranks of a distributed job."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from composer.utils import dist, get_device

from llmprune.utils.errors import UserError

T = TypeVar("T")

PATIENCE = 7 * 24 * 3600.0  # seconds that ranks wait for a rank that works alone


def share_cores() -> None:
    """Give every rank of this machine an equal number of cores; more threads than cores slow each other down manifold.

    The environment variable ``OMP_NUM_THREADS`` overrides this.
    """
    ranks = dist.get_local_world_size()
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))


def use_own_gpu() -> None:
    """Give every rank of this machine a GPU of its own, as long as there are enough."""
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_local_rank() % torch.cuda.device_count())


def init_distributed(device: str | None, patience: float = PATIENCE) -> None:
    """Connect the ranks of the job.

    Args:
        device: "cpu" or "gpu"; None = the GPU if there is one.
        patience: seconds that ranks wait for each other; the default is as long as the longest plan takes.
    """
    dist.initialize_dist(get_device(device), timeout=patience)


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 only, and return its result, or raise its ``UserError``, on every rank."""
    outcome: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = str(error)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    result: T = outcome[0]
    return result
