"""The constraint against finite differences and known values."""

import pytest
import torch

from llmprune.pruning.gates.lagrangian import lagrangian, warmed_up


def test_gradients_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(lambda s, a, b: lagrangian(s, 0.3, a, b), rows)


def test_known_value() -> None:
    s = torch.tensor([0.5, 0.2])
    value = lagrangian(s, 0.3, torch.tensor([1.0, 2.0]), torch.tensor([10.0, 0.0]))
    assert value.item() == pytest.approx(((0.2 + 0.4) + (-0.2)) / 2)


def test_it_vanishes_at_the_target() -> None:
    assert lagrangian(torch.full((4,), 0.25), 0.25, torch.randn(4), torch.randn(4)).item() == 0


@pytest.mark.parametrize(("progress", "expected"), [(0, 0.1), (0.5, 0.3), (1, 0.5), (7, 0.5)])
def test_warm_up_is_linear_and_stays(progress: float, expected: float) -> None:
    assert warmed_up(0.5, 0.1, progress) == pytest.approx(expected)
