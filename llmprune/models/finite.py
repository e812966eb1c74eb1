"""Checks for NaN, infinite and very large values in tensors."""

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a NaN or infinite value; None if there is none.

    Args:
        tensors: pairs of name and tensor; of a sharded tensor, this rank's part is checked.
    """
    return next((name for name, tensor in tensors if not is_finite(tensor)), None)


def first_beyond(tensors: Iterable[tuple[str, Tensor]], limit: float) -> str | None:
    """The name of the first tensor with NaN, or with a magnitude that is not below ``limit``; None if there is none."""
    return next((name for name, tensor in tensors if not is_below(tensor, limit)), None)


def is_below(tensor: Tensor, limit: float) -> bool:
    """Whether the magnitudes of all values are below ``limit``; of a sharded tensor, this rank's part is checked."""
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return not part.is_floating_point() or not part.numel() or bool(part.detach().abs().max() < limit)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values of a tensor are finite; of a sharded tensor, this rank's part is checked."""
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return not part.is_floating_point() or bool(part.detach().isfinite().all())
