"""Plans: what is possible, and that they survive the disk."""

import json
import os
from pathlib import Path

import pytest
import torch

from llmprune.models.families import Shape
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.utils.errors import UserError
from llmprune.utils.files import save_tensors

SOURCE = Shape(layers=4, hidden=32, heads=8, kv_heads=4, head_dim=8, intermediate=48)


def plan(*blocks: KeptBlock, **changes: object) -> Plan:
    return Plan(**{"family": "llama", "model": "abc", "source": SOURCE, "blocks": blocks, **changes})  # type: ignore[arg-type]


def test_the_shape_follows_from_what_is_kept() -> None:
    a = plan(
        KeptBlock.whole(0, heads=(0, 2), channels=(1, 5, 7)),
        KeptBlock.whole(3, heads=(4, 7), channels=(0, 1, 2)),
        hidden=(1, 2, 31),
    )
    assert a.shape == Shape(2, 3, 2, 2, 8, 3)
    assert a.heads_by_group(a.blocks[1]) == {2: [4], 3: [7]}


def test_a_saved_plan_is_the_same_plan(tmp_path: Path) -> None:
    factors = {"hidden": torch.rand(2), "mlp": torch.rand(1), "heads.2": torch.rand(4)}
    a = plan(KeptBlock.whole(2, heads=(0, 1, 2, 3)), hidden=(4, 9), factors=factors)
    a.save(tmp_path / "plan.json")
    b = Plan.load(tmp_path / "plan.json")
    assert (a.blocks, a.hidden, a.source, a.model) == (b.blocks, b.hidden, b.source, b.model)
    assert all(torch.equal(factors[name], b.factors[name]) for name in factors) and len(b.factors) == 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: plan(), "keeps no blocks"),
        (lambda: plan(KeptBlock.whole(4)), "between 0 and 3"),
        (lambda: plan(KeptBlock.whole(1), KeptBlock.whole(1)), "ascending"),
        (lambda: plan(KeptBlock(2, 1)), "ascending"),
        (lambda: plan(KeptBlock(0, 2), KeptBlock.whole(2)), "ascending"),
        (lambda: plan(KeptBlock.whole(0, heads=(0, 1, 2))), "different key/value groups"),
        (lambda: plan(KeptBlock.whole(0, channels=(1,)), KeptBlock.whole(1)), "different numbers of channels"),
        (lambda: plan(KeptBlock.whole(0), hidden=(3, 2)), "ascending"),
        (lambda: plan(KeptBlock.whole(0), factors={"hidden": torch.rand(3)}), "expected \\[32\\]"),
        (lambda: plan(KeptBlock.whole(0), factors={"nonsense": torch.rand(3)}), "nonsense"),
    ],
)
def test_impossible_plans_are_refused(build: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build()  # type: ignore[operator]


@pytest.mark.parametrize(
    "damage",
    [
        lambda v: v.pop("blocks"),
        lambda v: v.update(schema=2),
        lambda v: v.update(blocks=[{"attention": "x", "mlp": 0, "heads": None, "channels": None}]),
        lambda v: v.update(blocks=7),
        lambda v: v.update(source={"layers": 4}),
        lambda v: v.update(factors="plan.safetensors"),
        lambda v: v["source"].update(intermediate=10**12),
        lambda v: v["source"].update(intermediate=10**12, layers=10**12),
        lambda v: v["source"].update(layers=10**6, hidden=10**6),
        lambda v: v["source"].update(head_dim=10**200),
        lambda v: v["source"].update(experts=10**12),
        lambda v: v["source"].update(heads=10**12, kv_heads=10**12),
        lambda v: v.update(factors="."),
        lambda v: v.update(factors="pipe"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: object) -> None:
    plan(KeptBlock.whole(0)).save(tmp_path / "plan.json")
    values = json.loads((tmp_path / "plan.json").read_text())
    damage(values)  # type: ignore[operator]
    (tmp_path / "plan.json").write_text(json.dumps(values))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("kind", "name", "size"), [("factors", "hidden", 32), ("factors", "mlp", 1), ("corrections", "mean.mlp.2", 46)]
)
def test_numbers_that_are_none_are_refused(kind: str, name: str, size: int, number: float, tmp_path: Path) -> None:
    tensor = torch.ones(size)
    good = plan(KeptBlock.whole(2, channels=(0, 1)), **{kind: {name: tensor}})
    good.save(tmp_path / "plan.json")
    tensor[-1] = number
    with pytest.raises(UserError, match=f"'{name}' holds NaN or infinite numbers"):
        good.save(tmp_path / "other.json")
    assert not (tmp_path / "other.safetensors").exists()
    save_tensors(tmp_path / "plan.safetensors", {name: tensor})
    with pytest.raises(UserError, match=f"plan.json: '{name}' holds NaN or infinite numbers"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_with_something_unknown_is_refused(tmp_path: Path) -> None:
    whole = Plan("llama", "0" * 64, SOURCE, tuple(KeptBlock.whole(number) for number in range(SOURCE.layers)))
    whole.save(tmp_path / "plan.json")
    values = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**values, "later": None}))
    Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(json.dumps({**values, "later": "ffn"}))
    with pytest.raises(UserError, match="has the key 'later', which plans of this version do not have"):
        Plan.load(tmp_path / "plan.json")
