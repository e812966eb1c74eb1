"""Matrix products in bfloat16 with float32 weights, by PyTorch's autocast, and which casts autocast must not keep."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def products_in(dtype: torch.dtype | None, device: str) -> AbstractContextManager[None]:
    """While open, matrix products are computed in ``dtype``; None = no change.

    Without gradients no copy of a weight is kept until the end: all of them take half as much memory as the model.
    """
    if dtype is None:
        return nullcontext()
    return torch.autocast(device, dtype=dtype, cache_enabled=torch.is_grad_enabled())


def compute_in(model: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    """Make every forward pass of a model compute its matrix products in ``dtype``; None = no change."""
    if dtype is not None:
        forward = model.forward

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with products_in(dtype, model.device.type):
                return forward(*args, **kwargs)

        model.forward = run
    return model


def in_full_precision(device: str) -> AbstractContextManager[None]:
    """While open, autocast changes nothing: statistics within a forward pass are computed in their own dtypes."""
    return torch.autocast(device, enabled=False)


@contextmanager
def forgetting_casts(device: str) -> Iterator[None]:
    """While open, casts of weights are not kept if gradients are switched off.

    Autocast keeps the bfloat16 copy of every weight until its outermost block ends. A copy made by a pass without
    gradients has no gradient path to its weight, and a pass with gradients in the same block would reuse the copy: the
    weight would never learn.
    """
    if torch.is_grad_enabled() or not torch.is_autocast_enabled(device):
        yield
        return
    with torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False):
        yield


def in_autocast(tensor: Tensor) -> Tensor:
    """A tensor in the dtype of autocast's matrix products; unchanged if autocast is off."""
    device = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tensor
