"""What the ranks of a job share."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from composer.utils import dist, get_device

from llmprune.utils.errors import UserError

T = TypeVar("T")

PATIENCE = 7 * 24 * 3600.0  # seconds that ranks wait for one that works alone


def share_cores() -> None:
    """Give every rank of this machine its share of the cores: more threads than cores slow each other down manifold.

    ``OMP_NUM_THREADS`` overrides.
    """
    ranks = dist.get_local_world_size()
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))


def init_distributed(device: str | None, patience: float = PATIENCE) -> None:
    """Let the ranks find each other.

    Args:
        device: cpu or gpu; None = what is there.
        patience: seconds that they wait for one another; by default as long as the longest plan takes.
    """
    dist.initialize_dist(get_device(device), timeout=patience)


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 alone and give every rank its result or its ``UserError``."""
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
