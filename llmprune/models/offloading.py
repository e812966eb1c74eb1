"""A model whose blocks are read from its files when they are needed and dropped afterwards."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.accelerate import init_empty_weights

from llmprune.errors import UserError
from llmprune.families import family_of
from llmprune.models.loading import StoredWeights, load_config


class OffloadedModel:
    """Holds what lies outside the blocks, one block, and the next one while it is being read.

    Attributes:
        model: the model; its blocks have weights only within ``loaded``.
    """

    def __init__(self, path: str | Path, *, dtype: torch.dtype, device: torch.device, attention: str = "sdpa") -> None:
        """Read what lies outside the blocks.

        Raises:
            UserError: the model can't be read, or its weights don't fit its config.
        """
        config = load_config(path)
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
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None

    @contextmanager
    def loaded(self, number: int) -> Iterator[None]:
        """Give block ``number`` its weights; the one after it is read ahead."""
        if self._next is not None and self._next[0] == number:
            weights = self._next[1].result()
        else:
            weights = self._read_block(number)
        self._next = None
        if number + 1 < len(self._blocks):
            self._next = number + 1, self._reader.submit(self._read_block, number + 1)
        block = self._blocks[number]
        empty = dict(block.named_parameters())
        for name in list(weights):
            self._place(block, name, weights.pop(name))
        try:
            yield
        finally:
            for name, parameter in empty.items():
                self._place(block, name, parameter)

    def _read_block(self, number: int) -> dict[str, Tensor]:
        return {
            name: self._read(f"{self._prefix}.{number}.{name}", parameter)
            for name, parameter in self._blocks[number].named_parameters()
        }

    def _read(self, name: str, like: Tensor) -> Tensor:
        if name not in self._weights:
            raise UserError(f"the model's files have no tensor '{name}', which its config asks for")
        tensor = self._weights[name]
        if tensor.shape != like.shape:
            raise UserError(f"'{name}' has the shape {list(tensor.shape)}; its config asks for {list(like.shape)}")
        return tensor.to(self._device, self._dtype, copy=True)

    @staticmethod
    def _place(root: nn.Module, name: str, tensor: Tensor) -> None:
        module, _, own = name.rpartition(".")
        root.get_submodule(module)._parameters[own] = (
            tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        )
