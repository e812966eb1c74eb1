"""Uniform shapes of a size: they follow what the gates have learned."""

import math

import pytest
import torch
from torch import Tensor

from llmprune.models.families import Shape
from llmprune.models.families.llama import LLAMA
from llmprune.pruning.gates.kinds import gate_sizes
from llmprune.pruning.gates.uniform_shape import uniform_counts
from tests.conftest import tiny_config

SMOLLM2 = Shape(layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536)
KINDS = ("hidden", "kv_group", "intermediate", "layer")


def learned(source: Shape, **share: float) -> dict[str, Tensor]:
    """Probabilities to stay of every kind: that share of each row nearly closed, the rest open as gates can be."""
    found = {}
    for kind in KINDS:
        size = gate_sizes(source)[kind]
        row = torch.full((size[-1],), 0.998)
        row[: round(share.get(kind, 0) * size[-1])] = 0.01
        found[kind] = row.expand(size).clone()
    return found


def size_of(source: Shape, counts: dict[str, int]) -> int:
    """Attention and MLP parameters, by hand."""
    queries = counts["kv_group"] * source.heads_per_group * source.head_dim
    block = 2 * queries + 2 * counts["kv_group"] * source.head_dim + 3 * counts["intermediate"]
    return counts["layer"] * block * counts["hidden"]


FULL = {"layer": 30, "hidden": 576, "kv_group": 3, "intermediate": 1536}


def test_blocks_whose_gates_are_open_stay_while_channels_can_go() -> None:
    """What a run on a real model came to: a tenth gone by channels, a fifth wanted, every block's gate open."""
    rivals = uniform_counts(
        SMOLLM2, LLAMA.matrices(tiny_config()), learned(SMOLLM2, intermediate=0.13, hidden=0.01), 0.2, {}
    )
    assert rivals[0]["layer"] == 30 and rivals[0]["kv_group"] == 3 and rivals[0]["hidden"] >= 560
    for counts in rivals:
        assert size_of(SMOLLM2, counts) / size_of(SMOLLM2, FULL) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.4])
def test_blocks_go_where_their_gates_are_closed(sparsity: float) -> None:
    rivals = uniform_counts(SMOLLM2, LLAMA.matrices(tiny_config()), learned(SMOLLM2, layer=0.2), sparsity, {})
    best = rivals[0]
    assert abs(best["layer"] - 30 * (1 - sparsity)) <= 1 and best["hidden"] > 560
    assert size_of(SMOLLM2, best) / size_of(SMOLLM2, FULL) == pytest.approx(1 - sparsity, abs=0.01)


def test_every_kind_gives_in_proportion_to_what_is_closed() -> None:
    keep = learned(SMOLLM2, layer=0.1, hidden=0.1, intermediate=0.2)
    best = uniform_counts(SMOLLM2, LLAMA.matrices(tiny_config()), keep, 0.5, {})[0]
    gone = {kind: 1 - best[kind] / FULL[kind] for kind in FULL}
    assert gone["layer"] == pytest.approx(gone["hidden"], abs=0.04)
    assert gone["intermediate"] == pytest.approx(2 * gone["hidden"], abs=0.06)


@pytest.mark.parametrize("sparsity", [0.15, 0.3, 0.6])
def test_hidden_dimensions_stay_a_multiple_of_the_heads_where_they_must(sparsity: float) -> None:
    keep = learned(SMOLLM2, hidden=0.2, kv_group=0.3, intermediate=0.3)
    for kinds in (KINDS, ("hidden", "layer")):
        chosen = {kind: keep[kind] for kind in kinds}
        for counts in uniform_counts(
            SMOLLM2, LLAMA.matrices(tiny_config()), chosen, sparsity, {"hidden": 4}, whole_heads=True
        ):
            heads = 3 * counts.get("kv_group", 3)
            assert counts["hidden"] % math.lcm(heads, 4) == 0
