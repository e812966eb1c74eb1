"""Reading the inputs of modules during forward passes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from llmprune.models.autocast import in_full_precision


@contextmanager
def reading_inputs(modules: Mapping[str, nn.Module], readers: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
    """While open, ``readers`` are called with the inputs of the modules of the same names."""
    hooks = [
        modules[name].register_forward_pre_hook(lambda module, inputs, read=read: _in_full(read, inputs[0]))
        for name, read in readers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_full(read: Callable[[Tensor], None], values: Tensor) -> None:
    with in_full_precision(values.device.type):
        read(values)
