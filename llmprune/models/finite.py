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


def is_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor's numbers are finite; of a sharded one, those of this rank."""
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return not part.is_floating_point() or bool(part.detach().isfinite().all())
