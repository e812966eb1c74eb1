"""The distribution of the gates against sampling and a scalar computation by hand."""

import math

import pytest
import torch

from llmprune.pruning.gates.hard_concrete import deterministic, keep_probability, sample


def scalar_gate(log_alpha: float, u: float) -> float:
    """The formula, one number at a time."""
    s = 1 / (1 + math.exp(-(math.log(u / (1 - u)) + log_alpha) / (2 / 3)))
    return min(1.0, max(0.0, s * 1.2 - 0.1))


@pytest.mark.parametrize("log_alpha", [-4.6, -1.0, 0.0, 0.7, 4.6])
@pytest.mark.parametrize("u", [0.001, 0.3, 0.5, 0.92])
def test_sample_is_the_formula(log_alpha: float, u: float) -> None:
    z = sample(torch.tensor(log_alpha, dtype=torch.float64), torch.tensor(u, dtype=torch.float64))
    assert z.item() == pytest.approx(scalar_gate(log_alpha, u), abs=1e-12)


@pytest.mark.parametrize("log_alpha", [-4.6, -2.0, 0.0, 1.0, 3.0])
def test_keep_probability_is_the_share_of_samples_above_zero(log_alpha: float) -> None:
    noise = torch.rand(400_000, generator=torch.Generator().manual_seed(0))
    share = (sample(torch.full_like(noise, log_alpha), noise) > 0).float().mean().item()
    assert keep_probability(torch.tensor(log_alpha)).item() == pytest.approx(share, abs=4e-3)


def test_gates_start_open() -> None:
    assert 1 - keep_probability(torch.tensor(math.log(100))).item() == pytest.approx(0.002, abs=5e-4)


def test_extreme_noise_gives_finite_gradients() -> None:
    log_alpha = torch.tensor([0.0, 0.0], requires_grad=True)
    sample(log_alpha, torch.tensor([0.0, 1.0])).sum().backward()
    assert log_alpha.grad is not None and log_alpha.grad.isfinite().all()


def test_deterministic_zeroes_the_lowest_of_every_row() -> None:
    log_alpha = torch.tensor([[3.0, -1.0, 2.0, 0.0], [0.0, 0.0, 5.0, -4.0]])
    gates = deterministic(log_alpha, torch.tensor([2, 1]))
    assert (gates > 0).tolist() == [[True, False, True, False], [True, True, True, False]]
    assert gates[0, 0].item() == pytest.approx(1 / (1 + math.exp(-3.0 * 0.8 * 1.5)))


def test_deterministic_breaks_ties_by_index_and_keeps_the_count() -> None:
    gates = deterministic(torch.zeros(10), 4)
    assert gates.count_nonzero() == 6 and gates[:4].tolist() == [0, 0, 0, 0]
