"""Selections against brute force."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.conversion.commands import apply
from llmprune.models.families import family_of
from llmprune.models.loading import load_model
from llmprune.models.stored_weights import fingerprint
from llmprune.plans.plan import KeptBlock
from llmprune.pruning.planning import SELECTIONS
from llmprune.pruning.scoring.scores import Scores
from llmprune.pruning.selection.methods import Request, ScoredModel, cheapest_pairs, select
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.utils.errors import UserError

LAYERS = 6
NUMBERS = [3.0, 1.0, 2.0, 0.5, 4.0, 2.5]


def scores_of(model: PreTrainedModel, **sections: object) -> Scores:
    family = family_of(model.config)
    return Scores(
        model="somewhere",
        family=family.name,
        fingerprint=fingerprint(model.state_dict(), model.config),
        source=family.shape(model.config),
        data={},
        settings={"row_reduction": "sum", "matrix_reduction": "sum", "seed": 0},
        perplexity=None,
        **sections,  # type: ignore[arg-type]
    )


def request(model: PreTrainedModel, tokens: Tensor, config: PlanConfig, **sections: object) -> Request:
    sections = sections or {"blocks": {"given": NUMBERS}}
    parallel = family_of(model.config).is_parallel(model.config)
    return Request(scores_of(model, **sections), config, lambda: ScoredModel(model, tokens, 4), parallel, pytest.fail)


def kept(model: PreTrainedModel, tokens: Tensor, config: PlanConfig, **sections: object) -> list[int]:
    plan = select(request(model, tokens, config, **sections))
    assert all(block == KeptBlock.whole(block.attention) for block in plan.blocks)
    return [block.attention for block in plan.blocks]


def perplexity(model: PreTrainedModel, tokens: Tensor, live: Sequence[int]) -> float:
    """Of the model with only these blocks, sample by sample."""
    blocks = list(model.model.layers)
    model.model.layers = nn.ModuleList(blocks[block] for block in live)
    with torch.no_grad():
        losses = [model(input_ids=sample[None], labels=sample[None]).loss.double() for sample in tokens]
    model.model.layers = nn.ModuleList(blocks)
    return math.exp(torch.stack(losses).mean().item())


def test_lowest(trained: PreTrainedModel, calibration: Tensor) -> None:
    assert kept(trained, calibration, PlanConfig(criterion="given", remove=2)) == [0, 2, 4, 5]
    protected = PlanConfig(criterion="given", remove=2, protect_first=2, protect_last=1)
    assert kept(trained, calibration, protected) == [0, 1, 4, 5]


def test_of_equal_scores_the_later_blocks_go(trained: PreTrainedModel, calibration: Tensor) -> None:
    equal = {"blocks": {"given": [1.0] * LAYERS}}
    assert kept(trained, calibration, PlanConfig(criterion="given", remove=2), **equal) == [0, 1, 2, 3]


@pytest.mark.parametrize("remove", [1, 2, 3, 4])
@pytest.mark.parametrize("first", [0, 1])
def test_span_of_blocks(trained: PreTrainedModel, calibration: Tensor, remove: int, first: int) -> None:
    config = PlanConfig("span", "given", remove, protect_first=first, protect_last=1)
    starts = range(first, LAYERS - 1 - remove + 1)
    best = min(starts, key=lambda start: sum(NUMBERS[start : start + remove]))
    gone = range(best, best + remove)
    assert kept(trained, calibration, config) == [block for block in range(LAYERS) if block not in gone]


def test_span_by_similarity(trained: PreTrainedModel, calibration: Tensor) -> None:
    lengths = {str(n): [0.1] * (LAYERS - n + 1) for n in range(1, LAYERS + 1)}
    alike = {**lengths, "2": [0.1, 0.2, 0.9, 0.3, 0.8]}
    for name, values, gone in (("cosine", alike, {2, 3}), ("angular", alike, {0, 1})):
        found = kept(trained, calibration, PlanConfig("span", name, 2), spans={name: values})
        assert set(range(LAYERS)) - set(found) == gone


def test_a_list_of_sublayers(trained: PreTrainedModel, calibration: Tensor) -> None:
    plan = select(request(trained, calibration, PlanConfig("list", drop=["mlp.2", "attention.3", "5"])))
    assert plan.blocks == (KeptBlock.whole(0), KeptBlock.whole(1), KeptBlock(2, 3), KeptBlock.whole(4))


@pytest.mark.parametrize("drop", [["mlp.2"], ["attention.2", "mlp.3"], ["attention.0", "attention.1"]])
def test_a_sublayer_without_partner_is_refused(trained: PreTrainedModel, calibration: Tensor, drop: list[str]) -> None:
    with pytest.raises(UserError, match="without a partner"):
        select(request(trained, calibration, PlanConfig("list", drop=drop)))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_pairs_of_sublayers_by_trying_all(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for _ in range(20):
        costs = torch.rand(10, generator=generator).tolist()
        choices = [
            pairs
            for pairs in itertools.combinations(range(9), count)
            if all(b - a > 1 for a, b in itertools.pairwise(pairs))
        ]
        least = min(choices, key=lambda pairs: sum(costs[p] + costs[p + 1] for p in pairs))
        assert cheapest_pairs(costs, count) == list(least)


def test_sublayers_cross_blocks(trained: PreTrainedModel, calibration: Tensor) -> None:
    influence = {"attention": [9.0, 9, 9, 0.1, 9, 9], "mlp": [9.0, 9, 0.1, 9, 9, 9]}
    plan = select(request(trained, calibration, PlanConfig("sublayers", remove=1), subblocks=influence))
    assert KeptBlock(2, 3) in plan.blocks and len(plan.blocks) == LAYERS - 1


def test_iterative(trained: PreTrainedModel, calibration: Tensor) -> None:
    live = list(range(LAYERS))
    for _ in range(3):
        candidates = {block: perplexity(trained, calibration, [b for b in live if b != block]) for block in live}
        live.remove(min(candidates, key=candidates.__getitem__))
    assert kept(trained, calibration, PlanConfig("iterative", "perplexity", 3)) == live
    assert len(trained.model.layers) == trained.config.num_hidden_layers == LAYERS


@pytest.mark.parametrize("criterion", ["taylor", "block_influence", "magnitude_l2"])
def test_iterative_scores_what_is_left(trained: PreTrainedModel, calibration: Tensor, criterion: str) -> None:
    found = kept(trained, calibration, PlanConfig("iterative", criterion, 2, protect_first=1))
    assert 0 in found and len(found) == LAYERS - 2


def test_greedy(trained: PreTrainedModel, calibration: Tensor) -> None:
    """The same as trying every removal by itself, with the first and last block protected."""
    live = list(range(LAYERS))
    for _ in range(3):
        candidates = {b: perplexity(trained, calibration, [x for x in live if x != b]) for b in live if 0 < b < 5}
        live.remove(min(candidates, key=candidates.__getitem__))
    assert kept(trained, calibration, PlanConfig("greedy", remove=3)) == live


def test_block_evaluations_of_greedy(trained: PreTrainedModel, calibration: Tensor) -> None:
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    hooks = [block.register_forward_hook(counted) for block in trained.model.layers]
    kept(trained, calibration[:4], PlanConfig("greedy", remove=3))
    for hook in hooks:
        hook.remove()
    assert count == LAYERS + sum((LAYERS - k - 2) * (LAYERS - k - 1) // 2 for k in range(3))
    of_32 = 32 + sum((32 - k - 2) * (32 - k - 1) // 2 for k in range(7))
    assert of_32 == 2692


def final_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    found: list[Tensor] = []
    hook = model.model.layers[-1].register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        model(input_ids=tokens)
    hook.remove()
    return found[0]


def test_merging(trained: PreTrainedModel, calibration: Tensor, tmp_path: Path) -> None:
    """The last merge that fits is what a plan by hand makes of it, and its states are as alike as asked for."""
    trained.save_pretrained(tmp_path / "source")
    whole = final_states(trained, calibration)
    ends = {"protect_first": 0, "protect_last": 0}
    config = PlanConfig("merge", threshold=0.2, merge_size=3, merge_step=1, remove=2, **ends)
    plan = select(request(trained, calibration, config))
    assert len(plan.blocks) == LAYERS - 2
    apply(tmp_path / "source", plan, tmp_path / "cut")
    merged = load_model(tmp_path / "cut").eval()
    (block,) = (block for block in plan.blocks if block.merge)
    first = block.attention
    assert dict(block.merge or ()) == {first: -1.0, first + 1: 1.0, first + 2: 1.0}
    position = plan.blocks.index(block)
    source = load_model(tmp_path / "source")
    sources = [dict(source.model.layers[first + k].named_parameters()) for k in range(3)]
    for name, parameter in merged.model.layers[position].named_parameters():
        expected = sources[0][name] + sum(other[name] - sources[0][name] for other in sources[1:])
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-6)
    assert F.cosine_similarity(final_states(merged, calibration), whole, dim=-1).mean() >= 0.2
    strict = PlanConfig("merge", threshold=1.0, merge_size=3)
    with pytest.raises(UserError, match="no merge keeps"):
        select(request(trained, calibration, strict))


def test_a_merge_of_two_is_the_second(trained: PreTrainedModel, calibration: Tensor) -> None:
    """In the place of the first, whose kind of attention (a window or none) it keeps."""
    config = PlanConfig("merge", threshold=0.2, merge_size=2, remove=1, protect_first=0, protect_last=0)
    blocks = select(request(trained, calibration, config)).blocks
    assert blocks == (*(KeptBlock.whole(number) for number in range(4)), KeptBlock(4, 4, merge=((5, 1.0),)))


def test_merges_undo_what_they_tried(trained: PreTrainedModel, calibration: Tensor) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    with pytest.raises(UserError):
        select(request(trained, calibration, PlanConfig("merge", threshold=1.0)))
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PlanConfig(criterion="given", remove=6), "6 of 6 blocks can't be removed: choose 1 to 5"),
        (PlanConfig(criterion="given", remove=0), "0 of 6 blocks can't be removed"),
        (PlanConfig(criterion="given"), "--remove"),
        (PlanConfig(remove=1), "--criterion"),
        (PlanConfig(criterion="gien", remove=1), "did you mean 'given'"),
        (PlanConfig(criterion="given", remove=2, protect_first=4, protect_last=1), "only 1 of 6 can go"),
        (PlanConfig("span", "given", 5, protect_first=2), "only 4 of 6"),
        (PlanConfig("spann", "given", 1), "did you mean 'span'"),
        (PlanConfig("list", drop=["7"]), "there is no block 7"),
        (PlanConfig("list", drop=["head.1"]), "neither a block's number nor"),
        (PlanConfig("list"), "--drop"),
        (PlanConfig("list", drop=["²"]), "neither a block's number nor"),
        (PlanConfig("list", drop=["1"], protect_first=2), "leave out --protect-first"),
        (PlanConfig("greedy", "taylor", 1), "decides by itself"),
        (PlanConfig("merge", merge_size=7), "merge_size is 7, but only 4"),
        (PlanConfig("iterative", "cosine", 1), "needs a criterion of blocks"),
        (PlanConfig("sublayers", remove=1), "score again with the criteria attention and mlp"),
        (PlanConfig("merge", merge_size=1), "merge_size of at least 2"),
    ],
)
def test_impossible_requests(trained: PreTrainedModel, calibration: Tensor, config: PlanConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select(request(trained, calibration, config))


def test_every_way_is_described() -> None:
    described = SELECTIONS.describe()
    assert set(described) >= {"lowest", "span", "list", "sublayers", "iterative", "greedy", "merge"}
    assert all(described.values())
