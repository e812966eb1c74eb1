"""Activations that a model's forward pass keeps for its backward pass, counted on a model without memory."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmprune.models.families import family_of, skipped_of
from llmprune.models.own_model_types import with_skipped
from llmprune.models.vocabulary import without_head

_FEW = 64  # number of tokens of a sample if the forward pass must be real, because it depends on its values


@dataclass(frozen=True)
class Kept:
    """Bytes that a microbatch's forward pass keeps for the backward pass.

    Attributes:
        block: bytes kept by one block.
        outside: bytes kept outside the blocks, without the output layer.
        states: bytes of the residual stream between two blocks; checkpointed blocks keep nothing else.
    """

    block: int
    outside: int
    states: int


def kept_by(
    config: PretrainedConfig,
    *,
    samples: int,
    length: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    attention: str = "sdpa",
    prepare: Callable[[PreTrainedModel], object] | None = None,
) -> Kept:
    """Count the bytes that a forward pass keeps.

    Args:
        config: Hugging Face config of a supported family.
        samples: number of samples of a microbatch.
        length: number of tokens of each sample.
        dtype: dtype of the weights.
        autocast: dtype of matrix products; None = the weights' dtype.
        attention: attention implementation; flash attention keeps as much as SDPA.
        prepare: function that changes the model before the count; None = no change.
    """
    how = (dtype, autocast, "eager" if attention == "eager" else "sdpa", prepare)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            one, two = (_saved(_short(config, n), samples, length, *how) for n in (1, 2))
    except (DataDependentOutputException, DynamicOutputShapeException):  # masks or experts depend on values
        few = min(length, _FEW)
        one, two = (_saved(_short(config, n), samples, few, *how) for n in (1, 2))
        one, two = (round(saved * length / few) for saved in (one, two))
    hidden = family_of(config).shape(config).hidden
    return Kept(two - one, max(2 * one - two, 0), samples * length * hidden * dtype.itemsize)


def _short(config: PretrainedConfig, blocks: int) -> PretrainedConfig:
    whole = with_skipped(config, {}) if skipped_of(config) else copy.deepcopy(config)  # all blocks count as whole ones
    family = family_of(whole)
    shape = family.shape(whole)
    short = family.with_shape(whole, replace(shape, layers=blocks), range(blocks))
    short.use_cache = False
    return short


def _saved(
    config: PretrainedConfig,
    samples: int,
    length: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    attention: str,
    prepare: Callable[[PreTrainedModel], object] | None,
) -> int:
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).train()
        if prepare is not None:
            prepare(model)
    tokens = torch.zeros(samples, length, dtype=torch.int64)
    with (
        torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None),
        _counting(model) as kept,
        without_head(model),
    ):
        model(input_ids=tokens, use_cache=False)
    return sum(kept.values())


@contextmanager
def _counting(model: nn.Module) -> Iterator[dict[int, int]]:
    """Yield the bytes of every storage that autograd saves and that is not part of the model, by storage id."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # keeps tensors alive, because the id of a freed storage can be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
