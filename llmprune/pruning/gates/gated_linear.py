"""A matrix product whose weight is scaled by gates along both axes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """X · (rows ⊗ columns ∘ weight)ᵀ + rows ∘ bias.

    Scaling the weight costs O(parameters), gating activations O(tokens × width). The scaled weight is not kept for the
    backward pass, which computes it again, so that memory use is that of the plain product.

    Args:
        x: input, [..., in].
        weight: weight matrix, [out, in].
        bias: bias, [out]; None = no bias.
        rows: factors of the rows, float32 [out]; None = no factors.
        columns: factors of the columns, float32 [in]; None = no factors.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    y: Tensor = _ScaledProduct.apply(x, weight, rows, columns)
    if bias is None:
        return y
    return y + (bias if rows is None else bias * rows).to(y.dtype)


def _scale(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """Weight ∘ rows ⊗ columns in float32 (a new tensor)."""
    if columns is None:
        return weight * rows[:, None] if rows is not None else weight.clone()
    scaled = weight * columns
    return scaled if rows is None else scaled.mul_(rows[:, None])


class _ScaledProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, rows, columns)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, _scale(weight, rows, columns).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rows, columns = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        grad_x = grad_weight = grad_rows = grad_columns = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ _scale(weight, rows, columns).to(grad.dtype)).view_as(x)
        if any(ctx.needs_input_grad[1:]):
            of_scaled = (grad.t() @ x.flatten(0, -2)).float()
            if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
                product = of_scaled * weight
                if ctx.needs_input_grad[2]:
                    grad_rows = product.sum(1) if columns is None else product @ columns
                if ctx.needs_input_grad[3]:
                    grad_columns = product.sum(0) if rows is None else rows @ product
            if ctx.needs_input_grad[1]:
                if columns is not None:
                    of_scaled.mul_(columns)
                if rows is not None:
                    of_scaled.mul_(rows[:, None])
                grad_weight = of_scaled.to(weight.dtype)
        return grad_x, grad_weight, grad_rows, grad_columns
