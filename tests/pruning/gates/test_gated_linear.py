"""The scaled product against plain autograd."""

import itertools

import pytest
import torch

from llmprune.pruning.gates.gated_linear import gated_linear


@pytest.mark.parametrize(("with_rows", "with_columns", "with_bias"), list(itertools.product([True, False], repeat=3)))
def test_values_and_gradients_equal_plain_autograd(with_rows: bool, with_columns: bool, with_bias: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True) if with_bias else None
    rows = torch.rand(3, dtype=torch.float64, requires_grad=True) if with_rows else None
    columns = torch.rand(7, dtype=torch.float64, requires_grad=True) if with_columns else None
    inputs = [t for t in (x, weight, bias, rows, columns) if t is not None]
    seed = torch.randn(2, 5, 3, dtype=torch.float64)

    r = torch.ones(3, dtype=torch.float64) if rows is None else rows
    c = torch.ones(7, dtype=torch.float64) if columns is None else columns
    naive = (x @ torch.diag(c) @ weight.t() + (0 if bias is None else bias)) @ torch.diag(r)
    expected = torch.autograd.grad(naive, inputs, seed)
    gated = gated_linear(x, weight, bias, rows, columns)
    found = torch.autograd.grad(gated, inputs, seed)

    torch.testing.assert_close(gated, naive, rtol=1e-6, atol=1e-6)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_autocast_computes_in_low_precision_and_keeps_full_gradients() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(8, 16, requires_grad=True)
    rows = torch.rand(8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = gated_linear(x, weight, None, rows, None)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert rows.grad is not None and rows.grad.dtype == torch.float32
    torch.testing.assert_close(rows.grad, (x @ weight.t()).sum(0), rtol=5e-2, atol=0.2)
