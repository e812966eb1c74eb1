"""A check that a model fits into memory before it is loaded."""

import math

import psutil
import torch

from llmprune.models.source import Model
from llmprune.models.stored_weights import StoredWeights
from llmprune.utils.errors import UserError


def check_memory(model: Model, *, dtype: torch.dtype | None, on_gpu: bool, remedy: str) -> None:
    """Refuse a model that needs more memory than is free.

    Args:
        model: folder or hub name of the model.
        dtype: dtype of the weights in memory; None = as stored.
        on_gpu: whether the weights are in the GPU's memory, not in the machine's.
        remedy: advice if the model is too large, as the end of a sentence.

    Raises:
        UserError: less memory is free than the weights take.
    """
    weights = StoredWeights(model)
    needed = weights.size() if dtype is None else dtype.itemsize * sum(math.prod(weights.shape(n)) for n in weights)
    refuse_too_large(model, needed, on_gpu=on_gpu, remedy=remedy)


def refuse_too_large(model: object, needed: int, *, on_gpu: bool, remedy: str) -> None:
    """Refuse weights that need more memory than is free.

    Args:
        model: name of the model, for the message.
        needed: bytes of the weights in memory.
        on_gpu: whether the weights are in the GPU's memory, not in the machine's.
        remedy: advice if the model is too large, as the end of a sentence.

    Raises:
        UserError: less memory is free.
    """
    if on_gpu:
        torch.cuda.empty_cache()  # what PyTorch keeps for itself counts as used
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    if needed > free:
        raise UserError(f"the model {model} takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: {remedy}")
