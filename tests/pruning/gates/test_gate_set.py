"""What gates multiply, what they are led to, and the plan they lead to."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from llmprune.models.families import Shape, target_shape
from llmprune.models.families.llama import LLAMA
from llmprune.pruning.gates.gate_set import GateSet
from llmprune.pruning.gates.goals import Goal, ShapeGoal, SizeGoal
from llmprune.pruning.gates.kinds import DEPTH, WIDTH
from tests.conftest import tiny_config

SOURCE = Shape(layers=4, hidden=32, heads=8, kv_heads=4, head_dim=8, intermediate=48)
# How many gates of a row each kind is to keep below.
KEPT = {"hidden": 20, "kv_group": 2, "head": 1, "intermediate": 30, "layer": 3, "attention": 2, "mlp": 2}


def allowed_sets() -> Iterator[tuple[str, ...]]:
    """Every set of gates that may be trained together, written out from the rule in words."""
    for n in range(len(WIDTH) + 1):
        for width in itertools.combinations(WIDTH, n):
            depths: list[tuple[str, ...]] = [(), ("layer",), ("attention", "mlp")]
            if not width:
                depths = [d for m in (1, 2, 3) for d in itertools.combinations(DEPTH, m)]
            yield from ((*width, *depth) for depth in depths)


def shape_goal(kinds: tuple[str, ...]) -> ShapeGoal:
    kept = {kind: KEPT[kind] for kind in kinds}
    groups = kept.get("kv_group", 4)
    target = target_shape(
        SOURCE,
        {
            "layers": kept.get("layer", 4),
            "hidden": kept.get("hidden"),
            "intermediate": kept.get("intermediate"),
            "kv_heads": groups,
            "heads": groups * kept.get("head", 2),
        },
    )
    return ShapeGoal(SOURCE, target, kept.get("attention"), kept.get("mlp"))


def spread(gates: GateSet, seed: int = 0) -> GateSet:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2)
    return gates


def train(gates: GateSet, steps: int) -> None:
    """The constraint alone, with the recipe's optimisers and schedule."""
    main = torch.optim.Adam(gates.log_alpha.values(), lr=1.0, betas=(0.9, 0.95))
    ascent = torch.optim.Adam(
        [*gates.linear.values(), *gates.quadratic.values()], lr=1.0, betas=(0.9, 0.95), maximize=True
    )
    for step in range(steps):
        gates.zero_grad()
        gates.constraint(gates.targets(0.0, step / (steps / 5))).backward()
        for optimizer in (main, ascent):
            optimizer.param_groups[0]["lr"] = 0.1 + 0.9 * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.step()
        gates.clamp()


@pytest.mark.parametrize("kinds", allowed_sets(), ids="+".join)
def test_every_allowed_set_exports_exactly_its_target(kinds: tuple[str, ...]) -> None:
    goal = shape_goal(kinds)
    assert set(goal.kinds) == set(kinds)
    plan = spread(GateSet(SOURCE, goal)).plan("llama", "")
    kept = {kind: KEPT[kind] for kind in kinds}
    assert plan.shape.hidden == kept.get("hidden", 32) and plan.shape.intermediate == kept.get("intermediate", 48)
    assert plan.shape.kv_heads == kept.get("kv_group", 4)
    assert plan.shape.heads == plan.shape.kv_heads * kept.get("head", 2)
    if not {"attention", "mlp"} & set(kinds):
        assert plan.shape.layers == kept.get("layer", 4)
    for sublayer in ("attention", "mlp"):
        live = plan.factors.get(sublayer, torch.ones(plan.shape.layers)).count_nonzero()
        assert live == kept.get(sublayer, kept.get("layer", 4))


def test_sets_that_cannot_be_trained_together_are_all_others() -> None:
    from llmprune.pruning.gates.kinds import check_kinds
    from llmprune.utils.errors import UserError

    allowed = {frozenset(kinds) for kinds in allowed_sets()}
    every = [frozenset(c) for n in range(8) for c in itertools.combinations((*WIDTH, *DEPTH), n)]
    for kinds in every:
        if kinds in allowed:
            check_kinds(kinds)
        else:
            with pytest.raises(UserError, match=r"no gates|can't go with"):
                check_kinds(kinds)
    with pytest.raises(UserError, match="did you mean 'hidden'"):
        check_kinds(["hiden"])


def test_only_dimensions_that_shrink_have_gates() -> None:
    gates = GateSet(SOURCE, ShapeGoal(SOURCE, target_shape(SOURCE, {"heads": 4, "layers": 3})))
    assert gates.sizes == {"kv_group": (4, 4), "layer": (4,)}
    assert gates.goal.targets == {"kv_group": 0.5, "layer": 0.25}


def test_factors_are_the_products_of_the_gates() -> None:
    gates = GateSet(SOURCE, shape_goal(("hidden", "kv_group", "head", "attention", "mlp")))
    values = {kind: torch.rand(size) for kind, size in gates.sizes.items()}
    values["hidden"][:5] = 0
    factors = gates.factors(values)
    assert factors.attention is not None and factors.mlp is not None and factors.query is not None
    assert factors.attention[3, 7] == values["attention"][3] * values["hidden"][7]
    assert factors.mlp[2, 9] == values["mlp"][2] * values["hidden"][9]
    head, size = 5, SOURCE.head_dim  # the second query head of group 2
    expected = values["kv_group"][1, 2] * values["head"][1, 2, 1]
    assert (factors.query[1, head * size : (head + 1) * size] == expected).all()
    assert factors.kept["hidden"].sum() == 27 and factors.channel is None


def test_expected_sparsity_is_that_of_samples() -> None:
    gates = spread(GateSet(SOURCE, shape_goal(("layer", "attention"))))
    generator = torch.Generator().manual_seed(0)
    drawn = [gates.sample(generator) for _ in range(4000)]
    layer = torch.stack([(z["layer"] > 0).float() for z in drawn])
    attention = torch.stack([(z["attention"] > 0).float() for z in drawn]) * layer
    found = gates.sparsity()
    assert found["layer"].item() == pytest.approx(1 - layer.mean().item(), abs=5e-3)
    assert found["attention"].item() == pytest.approx(1 - attention.mean().item(), abs=5e-3)


def test_expected_size_by_enumerating_every_gate() -> None:
    """All 2^n gates of a tiny model, each weighed by its probability; sizes are counted on weights cut to zero."""
    tiny = Shape(layers=2, hidden=2, heads=2, kv_heads=1, head_dim=1, intermediate=2)
    kinds = ("hidden", "head", "intermediate", "attention", "mlp")
    gates = spread(GateSet(tiny, SizeGoal(tiny, LLAMA.matrices(tiny_config()), kinds, 0.5)))
    keep = gates.keep_probability()
    flat = torch.cat([keep[kind].detach().flatten() for kind in gates.sizes])
    expected = 0.0
    for bits in itertools.product((0.0, 1.0), repeat=flat.numel()):
        drawn = torch.tensor(bits)
        probability = torch.where(drawn > 0, flat, 1 - flat).prod().item()
        pieces = drawn.split([keep[kind].numel() for kind in gates.sizes])
        z = {kind: piece.view(size) for (kind, size), piece in zip(gates.sizes.items(), pieces, strict=True)}
        size = 0
        for block in range(2):
            query = torch.outer(z["head"][block, 0], z["hidden"])  # q and o: [heads · 1, hidden]
            key = torch.outer(torch.ones(1), z["hidden"])
            channel = torch.outer(z["intermediate"][block], z["hidden"])  # gate, up, down
            size += int(z["attention"][block] * (2 * query.count_nonzero() + 2 * key.count_nonzero()))
            size += int(z["mlp"][block] * 3 * channel.count_nonzero())
        expected += probability * size
    full = 2 * (2 * 2 * 2 + 2 * 1 * 2 + 3 * 2 * 2)
    assert gates.sparsity()["size"].item() == pytest.approx(1 - expected / full, abs=1e-6)


GOALS: dict[str, Goal] = {
    "shape": shape_goal(("layer", "hidden", "kv_group")),
    "sub-layers": shape_goal(("layer", "attention", "mlp")),
    "size": SizeGoal(
        SOURCE, LLAMA.matrices(tiny_config()), ("hidden", "kv_group", "head", "intermediate", "layer"), 0.6
    ),
}


@pytest.mark.parametrize("goal", GOALS.values(), ids=GOALS)
def test_constraint_gradients_by_finite_differences(goal: Goal) -> None:
    gates = spread(GateSet(SOURCE, goal).double())
    targets = gates.targets(0.0, 0.6)
    gates.constraint(targets).backward()
    for parameter in gates.parameters():
        flat, grad = parameter.data.view(-1), parameter.grad
        for i in range(0, flat.numel(), 5):
            kept = flat[i].item()
            values = []
            for step in (1e-6, -1e-6):
                flat[i] = kept + step
                values.append(gates.constraint(targets).item())
            flat[i] = kept
            assert grad is not None
            assert grad.view(-1)[i].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-6)


@pytest.mark.parametrize("kinds", allowed_sets(), ids="+".join)
def test_the_constraint_leads_every_kind_to_its_target_in_120_steps(kinds: tuple[str, ...]) -> None:
    gates = GateSet(SOURCE, shape_goal(kinds))
    train(gates, 120)
    coupled = "layer" in kinds and bool({"attention", "mlp"} & set(kinds))  # one kind's probability is in the other's
    for kind, rows in gates.sparsity().items():
        assert (rows - gates.goal.targets[kind]).abs().max().item() <= (0.03 if coupled else 0.01), kind


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
@pytest.mark.parametrize(
    "kinds", [("hidden", "kv_group", "intermediate", "layer"), ("intermediate", "attention", "mlp"), ("hidden",)]
)
def test_a_size_is_rounded_to_a_uniform_shape_of_that_size(kinds: tuple[str, ...], sparsity: float) -> None:
    gates = spread(GateSet(SOURCE, SizeGoal(SOURCE, LLAMA.matrices(tiny_config()), kinds, sparsity)))
    train(gates, 200)
    plan = gates.plan("llama", "")
    shape = plan.shape
    attentions, mlps = (plan.factors.get(k, torch.ones(shape.layers)).count_nonzero() for k in ("attention", "mlp"))
    heads = 2 * shape.heads + 2 * shape.kv_heads
    size = (attentions * heads * 8 + mlps * 3 * shape.intermediate) * shape.hidden
    full = 4 * (2 * 8 + 2 * 4) * 8 * 32 + 4 * 3 * 48 * 32
    assert 1 - size / full == pytest.approx(sparsity, abs=0.02 if "intermediate" in kinds or "hidden" in kinds else 0)


def test_uniform_shapes_are_multiples() -> None:
    kinds = ("hidden", "kv_group", "intermediate", "layer")
    goal = SizeGoal(SOURCE, LLAMA.matrices(tiny_config()), kinds, 0.5, {"hidden": 8, "intermediate": 16})
    plan = spread(GateSet(SOURCE, goal)).plan("llama", "")
    assert plan.shape.hidden % 8 == 0 and plan.shape.intermediate % 16 == 0


@pytest.mark.parametrize("sparsity", [0.3, 0.6])
def test_hidden_and_heads_of_a_size_shrink_together_where_they_must(sparsity: float) -> None:
    source = Shape(layers=4, hidden=64, heads=8, kv_heads=8, head_dim=8, intermediate=48)
    kinds = ("hidden", "kv_group", "intermediate", "layer")
    matrices = {"query": 4, "key_value": 0, "channel": 2}
    goal = SizeGoal(source, matrices, kinds, sparsity, coupled=True)
    gates = spread(GateSet(source, goal))
    train(gates, 150)
    shape = gates.plan("opt", "").shape
    assert shape.hidden == shape.heads * 8
    size = shape.layers * (4 * shape.heads * 8 + 2 * shape.intermediate) * shape.hidden
    assert 1 - size / (4 * (4 * 64 + 2 * 48) * 64) == pytest.approx(sparsity, abs=0.03)
