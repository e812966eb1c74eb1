"""Models whose parameters are sharded over ranks (FSDP2)."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from llmprune.models.block_hooks import blocks_of
from llmprune.models.parameters import plain_name
from llmprune.models.stored_weights import StoredWeights


def mesh_of(parameters: Iterable[nn.Parameter]) -> DeviceMesh | None:
    """The device mesh of a model's sharded parameters; None = every rank has all parameters."""
    return next((p.device_mesh for p in parameters if isinstance(p, DTensor)), None)


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard a model over ranks, block by block."""
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def reshard(model: nn.Module) -> None:
    """Free parameters gathered in forward passes; without a backward pass some of them would stay in memory."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def fill(
    model: PreTrainedModel, weights: StoredWeights, stored_name: Callable[[str], str | None] = lambda name: name
) -> None:
    """Read this rank's rows of the parameters of a sharded model.

    Args:
        model: sharded model.
        weights: stored weights of the model, before any module was added.
        stored_name: function from a parameter's name to its name in ``weights``; None = the parameter was added and
            stays as it is.
    """
    for name, parameter in model.named_parameters():
        stored = stored_name(plain_name(name))
        if stored is None:
            continue
        assert isinstance(parameter, DTensor), name
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        parameter.to_local().copy_(weights.rows(stored, offset[0], offset[0] + shape[0]))
