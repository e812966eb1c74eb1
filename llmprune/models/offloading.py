"""Offloaded models: each block is read from the model's files when it is needed and freed afterwards."""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.accelerate import init_empty_weights

from llmprune.models.families import family_of
from llmprune.models.loading import load_model_config
from llmprune.models.source import Model
from llmprune.models.stored_weights import StoredWeights
from llmprune.utils.errors import UserError

PIECE = 2**21  # number of values read at a time


class OffloadedModel:
    """A model with one block and all weights outside the blocks in memory; the next block's files are read ahead.

    Attributes:
        model: model whose blocks have weights only within ``loaded``.
    """

    def __init__(self, path: Model, *, dtype: torch.dtype, device: torch.device, attention: str | None = None) -> None:
        """Read the weights outside the blocks.

        Raises:
            UserError: the model can't be read, or its weights don't fit its config.
        """
        config = load_model_config(path)
        self._weights, self._dtype, self._device = StoredWeights(path), dtype, device
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()
        self.model.tie_weights()
        family = family_of(config)
        self._prefix = family.blocks
        self._blocks = list(self.model.get_submodule(family.blocks).children())
        for name, parameter in list(self.model.named_parameters()):
            if not name.startswith(f"{self._prefix}."):
                self._place(self.model, name, self._read(name, parameter))
        self.model.tie_weights()
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._ahead: Future[None] | None = None

    @contextmanager
    def loaded(self, number: int) -> Iterator[None]:
        """While open, block ``number`` has its weights; meanwhile the next block's files are read ahead."""
        if self._ahead is not None:
            self._ahead.result()
        block = self._blocks[number]
        empty = dict(block.named_parameters())
        for name, parameter in empty.items():
            self._place(block, name, self._read(self._name(number, name), parameter))
        if number + 1 < len(self._blocks):
            self._ahead = self._reader.submit(self._read_ahead, number + 1)
        try:
            yield
        finally:
            for name, parameter in empty.items():
                self._place(block, name, parameter)

    def _name(self, number: int, name: str) -> str:
        return f"{self._prefix}.{number}.{name}"

    def _read_ahead(self, number: int) -> None:
        """Read a block's bytes into the system's file cache, which the system shrinks if memory is short."""
        for name, parameter in self._blocks[number].named_parameters():
            for _ in self._pieces(self._name(number, name), parameter):
                pass

    def _read(self, name: str, like: Tensor) -> Tensor:
        tensor = torch.empty(like.shape, dtype=self._dtype, device=self._device)
        for start, piece in self._pieces(name, like):
            tensor[start : start + len(piece)] = piece
        return tensor

    def _pieces(self, name: str, like: Tensor) -> Iterator[tuple[int, Tensor]]:
        """A tensor's rows, some at a time, because a file's pages stay in memory while a tensor refers to them."""
        if name not in self._weights:
            raise UserError(f"the model's files have no tensor '{name}', which its config asks for")
        shape = self._weights.shape(name)
        if shape != list(like.shape):
            raise UserError(f"'{name}' has the shape {shape}; its config asks for {list(like.shape)}")
        rows = max(1, PIECE // max(math.prod(shape[1:]), 1))
        for start in range(0, shape[0], rows):
            yield start, self._weights.rows(name, start, min(start + rows, shape[0]))

    @staticmethod
    def _place(root: nn.Module, name: str, tensor: Tensor) -> None:
        module, _, own = name.rpartition(".")
        root.get_submodule(module)._parameters[own] = (
            tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        )
