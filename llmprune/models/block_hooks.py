"""Hooks that replace the call of each block in a model's own forward pass, for any family."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.models.families import family_of


class RunBlock(Protocol):
    """A function that runs a block, or another block in its place, on hidden states [batch, length, hidden]."""

    def __call__(self, x: Tensor, block: nn.Module | None = None) -> Tensor:
        """The output of the block, or of ``block`` in its place, for the hidden states ``x``."""


BlockHook = Callable[[int, RunBlock, Tensor], Tensor]


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a model of a supported family."""
    blocks = model.get_submodule(family_of(model.config).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


@contextmanager
def hooked_blocks(model: PreTrainedModel, visit: BlockHook, beside: nn.Module | None = None) -> Iterator[None]:
    """While open, ``model``'s forward pass calls ``visit(number, run, states)`` in place of every block.

    ``states`` [batch, length, hidden] is the block's input, and the returned tensor is the next block's input;
    ``run(x)`` runs the block itself, for any number of samples of the same length, if none is padded; ``run(x, other)``
    runs another block with this one's masks and positions.

    Args:
        model: model of a supported family.
        visit: function that is called in place of every block.
        beside: another module that ``visit`` runs; if it is sharded, it becomes a part of the sharded model; None =
            none.
    """
    blocks, in_tuple = blocks_of(model), family_of(model.config).tuple_blocks
    originals = list(blocks)
    try:
        for number, block in enumerate(originals):
            blocks[number] = _HookedBlock(number, block, visit, in_tuple)
        if beside is not None:
            blocks[0]._modules["beside"] = beside
        yield
    finally:
        for number, block in enumerate(originals):
            blocks[number] = block


def hidden_states_in(output: Tensor | tuple[Any, ...]) -> Tensor:
    """The hidden states in the output of a module."""
    return output[0] if isinstance(output, tuple) else output


class _HookedBlock(nn.Module):
    """A module in the place of a block; all attributes except the forward pass are the block's."""

    def __init__(self, number: int, block: nn.Module, visit: BlockHook, in_tuple: bool) -> None:
        super().__init__()
        self._number, self._visit, self._in_tuple = number, visit, in_tuple
        # The block is a submodule, because a sharded model searches submodules for shards in the first forward pass.
        self._modules["visited"] = block

    def __getattr__(self, name: str) -> Any:
        block = self.__dict__["_modules"]["visited"]
        return block if name == "visited" else getattr(block, name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        visited = self._modules["visited"]
        assert visited is not None

        def run(x: Tensor, block: nn.Module | None = None) -> Tensor:
            fitted = hidden_states.shape[0], x.shape[0]
            own = {name: _fit(value, *fitted) for name, value in kwargs.items()}
            return hidden_states_in((block or visited)(x, *(_fit(value, *fitted) for value in args), **own))

        states = self._visit(self._number, run, hidden_states)
        return (states,) if self._in_tuple else states


def _fit(value: Any, batch: int, wanted: int) -> Any:
    """Masks and positions for another number of samples; without padding they are equal for all samples."""
    if isinstance(value, tuple):
        return tuple(_fit(item, batch, wanted) for item in value)
    if wanted != batch and isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == batch:
        return value[:1]
    return value


@contextmanager
def shortened(model: PreTrainedModel, kept: Sequence[int]) -> Iterator[None]:
    """While open, ``model`` has only the blocks in ``kept`` (for forward passes without a cache)."""
    family = family_of(model.config)
    parent, _, name = family.blocks.rpartition(".")
    blocks, field = blocks_of(model), family.fields["layers"]
    layers = getattr(model.config, field)
    try:
        setattr(model.get_submodule(parent), name, nn.ModuleList(blocks[number] for number in kept))
        setattr(model.config, field, len(kept))
        yield
    finally:
        setattr(model.get_submodule(parent), name, blocks)
        setattr(model.config, field, layers)
