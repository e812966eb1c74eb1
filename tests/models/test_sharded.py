"""What a sharded model gathers, it frees: no block stays whole after a forward pass."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from llmprune.models.block_hooks import RunBlock, blocks_of, hooked_blocks
from llmprune.models.sharded import mesh_of, reshard, shard
from llmprune.recovery.teachers import states_of
from llmprune.utils.ranks import init_distributed
from tests.conftest import random_model, tiny_config


@pytest.mark.parametrize("grad", [False, True])
def test_blocks_that_were_visited_are_sharded_again(tokens: torch.Tensor, grad: bool) -> None:
    init_distributed("cpu")
    model, whole = random_model(tiny_config()), random_model(tiny_config())
    shard(model, init_device_mesh("cpu", (1,)))
    assert mesh_of(model.parameters()) is not None
    with torch.set_grad_enabled(grad):
        found, expected = (states_of(m, {"input_ids": tokens}, [1]) for m in (model, whole))
    assert torch.equal(found.final, expected.final) and torch.equal(found.after[1], expected.after[1])
    for number, block in enumerate(blocks_of(model)):
        assert all(isinstance(p, DTensor) for p in block.parameters()), f"block {number} is whole"
    embedding = model.get_input_embeddings().weight
    assert not isinstance(embedding, DTensor)  # a backward pass would need it next
    reshard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())


def test_what_runs_beside_is_a_part_of_the_sharded_model(tokens: torch.Tensor) -> None:
    """Two blocks replace two others, as a module of their own, which is sharded, too."""
    init_distributed("cpu")
    model, mesh = random_model(tiny_config()), init_device_mesh("cpu", (1,))
    others = nn.ModuleList(copy.deepcopy(block) for block in list(blocks_of(model))[1:3])
    shard(model, mesh)
    for block in others:
        fully_shard(block, mesh=mesh)

    def visit(number: int, run: RunBlock, states: torch.Tensor) -> torch.Tensor:
        return run(states, others[number - 1]) if number in (1, 2) else run(states)

    plain = random_model(tiny_config())(input_ids=tokens, use_cache=False).logits
    for _ in range(2):
        with hooked_blocks(model, visit, others):
            logits = model(input_ids=tokens, use_cache=False).logits
        assert torch.equal(logits, plain)
        assert all(isinstance(p, DTensor) for block in (*others, *blocks_of(model)) for p in block.parameters())
        logits.sum().backward()
        assert all(isinstance(p, DTensor) for p in (*others.parameters(), *model.parameters()))
    assert all(p.grad is not None for p in others.parameters())
    assert all(p.grad is None for block in list(blocks_of(model))[1:3] for p in block.parameters())
