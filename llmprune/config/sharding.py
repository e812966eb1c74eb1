"""Sharding parameters, gradients and optimiser states over ranks (FSDP2), as Composer does it."""

import warnings
from dataclasses import dataclass
from typing import Literal

from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config, ParallelismConfig

from llmprune.utils.errors import UserError
from llmprune.utils.settings import limited

STATE_DICTS = {"sharded": "sharded", "whole": "full"}  # our name: Composer's name


@dataclass
class ShardingConfig:
    """Sharding over ranks (FSDP2); without this section every rank has the whole model and optimizer state.

    Attributes:
        replicas: number of groups of ranks that each hold the whole model, sharded within the group (hybrid sharding);
            usually the number of nodes, so that only gradients are sent between nodes. 1 = sharded over all ranks.
        reshard_after_forward: free each block's gathered parameters between forward and backward; false is faster and
            needs more memory.
        checkpoints: form of checkpoints: ``sharded`` (every rank writes its shards) or ``whole`` (one file).
    """

    replicas: int = limited(1, least=1)
    reshard_after_forward: bool = True
    checkpoints: Literal["sharded", "whole"] = "sharded"


@dataclass
class _Sharding(FSDP2Config):
    """Composer's settings of FSDP2, with hybrid sharding and a folder name like that of other checkpoints.

    Composer makes the device mesh from the two degrees and overwrites any mesh that it is given.
    """

    replicas: int = 1

    @property
    def data_parallel_replicate_degree(self) -> int | None:
        return None if self.replicas == 1 else self.replicas

    @property
    def sharded_ckpt_prefix_dir(self) -> str:
        return "ba{batch}"


def check_sharding(config: ShardingConfig, *, on_cpu: bool) -> None:
    """Check the section against the number of ranks and the device.

    Args:
        config: settings of the section.
        on_cpu: whether the run uses no GPU.

    Raises:
        UserError: a value is out of range or does not fit the number of ranks.
    """
    ranks = dist.get_world_size()
    if ranks % config.replicas:
        raise UserError(f"sharding.replicas {config.replicas} must divide the number of ranks, {ranks}")
    if config.replicas > 1 and on_cpu:
        raise UserError("hybrid sharding (sharding.replicas > 1) needs GPUs: gloo can't average between replicas")


class AverageGradients(Algorithm):
    """Divides gradients by the number of ranks, before they are clipped.

    FSDP2 requests the mean over ranks, but gloo returns the sum without an error. Optimisers like Adam are not affected
    by the factor, clipping is.
    """

    def match(self, event: Event, state: State) -> bool:
        """Whether the event is the end of a batch's backward passes."""
        return event == Event.AFTER_TRAIN_BATCH

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Divide the summed gradients by the number of ranks."""
        for parameter in state.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(dist.get_world_size())


def parallelism(config: ShardingConfig | None, activation_checkpointing: bool) -> ParallelismConfig | None:
    """The parallelism settings of Composer's trainer; None = data-parallel."""
    if config is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning that FSDP2 is experimental
        settings = _Sharding(
            replicas=config.replicas,
            reshard_after_forward=config.reshard_after_forward,
            activation_checkpointing=activation_checkpointing,
            state_dict_type=STATE_DICTS[config.checkpoints],
        )
    return ParallelismConfig(fsdp2=settings)
