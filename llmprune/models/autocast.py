"""Matrix products in bfloat16 with weights in float32: what PyTorch's autocast does, and what it must not remember."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def products_in(dtype: torch.dtype | None, device: str) -> AbstractContextManager[None]:
    """While open, matrix products are computed in ``dtype``; None = as it was before."""
    return nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)


@contextmanager
def forgetting_casts(device: str) -> Iterator[None]:
    """While open, casts of weights are not kept if no gradients are wanted.

    Autocast keeps the bfloat16 copy of every weight until its outermost block ends. A copy that a pass without
    gradients has made has no way back to its weight, and a pass with gradients in the same block would reuse it: the
    weight would never learn.
    """
    if torch.is_grad_enabled() or not torch.is_autocast_enabled(device):
        yield
        return
    with torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False):
        yield


def in_autocast(tensor: Tensor) -> Tensor:
    """A tensor in the dtype that autocast computes matrix products in; as it is, where autocast is off."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
