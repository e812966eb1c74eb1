"""Whether tensors hold numbers."""

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds NaN or an infinite number; None if there is none.

    Args:
        tensors: with their names; of a sharded one this rank's part is looked at.
    """
    return next((name for name, tensor in tensors if not is_finite(tensor)), None)


def first_beyond(tensors: Iterable[tuple[str, Tensor]], limit: float) -> str | None:
    """The name of the first tensor that holds NaN, or a number whose magnitude is not below ``limit``."""
    return next((name for name, tensor in tensors if not is_below(tensor, limit)), None)


def is_below(tensor: Tensor, limit: float) -> bool:
    """Whether the magnitude of all numbers is below ``limit``; of a sharded tensor, of those of this rank."""
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return not part.is_floating_point() or not part.numel() or bool(part.detach().abs().max() < limit)


def is_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor's numbers are finite; of a sharded one, those of this rank."""
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return not part.is_floating_point() or bool(part.detach().isfinite().all())
