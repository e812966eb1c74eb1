"""Which gates there are, what they multiply, and the plan they lead to."""

import pytest
import torch

from llmprune.families import Shape, target_shape
from llmprune.gates.gate_set import GateSet, gate_kinds

SOURCE = Shape(layers=4, hidden=32, heads=8, kv_heads=4, head_dim=8, intermediate=48)


def test_only_dimensions_that_shrink_have_gates() -> None:
    kinds = gate_kinds(SOURCE, target_shape(SOURCE, {"heads": 4, "layers": 3}))
    assert {name: kind.size for name, kind in kinds.items()} == {"kv_group": (4, 4), "layer": (4,)}
    assert kinds["layer"].target == 0.25


def test_queries_within_groups_have_a_row_per_group() -> None:
    kinds = gate_kinds(SOURCE, target_shape(SOURCE, {"heads": 4, "kv_heads": 4}))
    assert {name: kind.size for name, kind in kinds.items()} == {"head": (4, 4, 2)}


def test_factors_are_the_products_of_the_gates() -> None:
    gates = GateSet(SOURCE, target_shape(SOURCE, {"layers": 2, "hidden": 20, "heads": 2, "kv_heads": 2}))
    values = {name: torch.rand(kind.size) for name, kind in gates.kinds.items()}
    values["hidden"][:5] = 0
    factors = gates.factors(values)
    assert factors.residual is not None and factors.query is not None and factors.kept_hidden is not None
    assert factors.residual[3, 7] == values["layer"][3] * values["hidden"][7]
    head, size = 5, SOURCE.head_dim  # the second query head of group 2
    expected = values["kv_group"][1, 2] * values["head"][1, 2, 1]
    assert (factors.query[1, head * size : (head + 1) * size] == expected).all()
    assert factors.kept_hidden == 27 and factors.channel is None


def test_expected_sparsity_is_that_of_samples() -> None:
    gates = GateSet(SOURCE, target_shape(SOURCE, {"intermediate": 24}))
    with torch.no_grad():
        gates.log_alpha["intermediate"].copy_(torch.randn(4, 48) * 3)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([gates.sample(generator)["intermediate"] == 0 for _ in range(3000)]).float().mean((0, 2))
    torch.testing.assert_close(gates.sparsity("intermediate").detach(), drawn, atol=5e-3, rtol=0)


def test_constraint_gradients_by_finite_differences() -> None:
    gates = GateSet(SOURCE, target_shape(SOURCE, {"layers": 3, "heads": 4})).double()
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.copy_(torch.randn(parameter.shape))
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


def test_the_constraint_leads_to_the_target() -> None:
    target = target_shape(SOURCE, {"layers": 3, "hidden": 20, "heads": 4, "intermediate": 30})
    gates = GateSet(SOURCE, target)
    main = torch.optim.Adam(gates.log_alpha.values(), lr=1.0, betas=(0.9, 0.95))
    ascent = torch.optim.Adam(
        [*gates.linear.values(), *gates.quadratic.values()], lr=1.0, betas=(0.9, 0.95), maximize=True
    )
    for step in range(120):
        gates.zero_grad()
        gates.constraint(gates.targets(0.0, step / 24)).backward()
        for optimizer in (main, ascent):
            optimizer.param_groups[0]["lr"] = 0.1 + 0.9 * (1 - step / 120)
            optimizer.step()
        gates.clamp()
    for name, kind in gates.kinds.items():
        assert gates.sparsity(name).mean().item() == pytest.approx(kind.target, abs=0.03), name
    assert gates.plan("llama", "").shape == target
