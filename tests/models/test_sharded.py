"""What a sharded model gathers, it frees: no block stays whole behind a forward pass."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from llmprune.models.sharded import mesh_of, reshard, shard
from llmprune.models.walking import blocks_of
from llmprune.ranks import initialize_ranks
from llmprune.recovery.teachers import states_of
from tests.conftest import random_model, tiny_config


@pytest.mark.parametrize("grad", [False, True])
def test_blocks_that_were_visited_are_sharded_again(tokens: torch.Tensor, grad: bool) -> None:
    initialize_ranks("cpu")
    model, whole = random_model(tiny_config()), random_model(tiny_config())
    shard(model, init_device_mesh("cpu", (1,)))
    assert mesh_of(model.parameters()) is not None
    with torch.set_grad_enabled(grad):
        found, expected = (states_of(m, {"input_ids": tokens}, [1]) for m in (model, whole))
    assert torch.equal(found.final, expected.final) and torch.equal(found.behind[1], expected.behind[1])
    for number, block in enumerate(blocks_of(model)):
        assert all(isinstance(p, DTensor) for p in block.parameters()), f"block {number} is whole"
    embedding = model.get_input_embeddings().weight
    assert not isinstance(embedding, DTensor)  # a backward pass would need it next
    reshard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
