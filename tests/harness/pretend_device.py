"""A device that does not exist: mistakes that only a GPU would show, found on a CPU.

Tensors on the pretended device hold real numbers in the machine's memory, so that everything computes as on a CPU. But
they say that they are elsewhere, and they behave as tensors on a GPU do:

- **They refuse to be mixed** with tensors on the CPU, except with those of a single number (as CUDA allows), as index
  tensors, and in copies. A ``torch.zeros(…)`` without ``device=`` in the product ends in ``MixedDevices``.
- **They count waits.** Wherever the host would have to wait for a GPU, a wait is noted with its place in the product:
  ``read`` (``item()``, ``tolist()``, ``bool(tensor)``, ``torch.equal``, ``.cpu()``), ``size`` (a shape that depends on
  values: ``nonzero``, indexing with booleans, ``unique``) and ``copy`` (a blocking copy from the host, such as
  ``torch.tensor(numbers, device=…)``). A copy with ``non_blocking=True`` is no wait.

An example:

    with pretended() as waits:
        model.to(DEVICE)                              # parameters stay the same objects, as with CUDA
        loss = model(tokens.to(DEVICE, non_blocking=True))
        loss.backward()
        assert waits.of("read", "size") == 0, waits
        loss.item()
        assert waits.of("read") == 1
        model(tokens)                                 # raises MixedDevices

What it does not show: speed, memory, number formats that only a GPU computes in (autocast does nothing there), kernels'
own restrictions, and operations that wait in ways that are not listed in ``_WAITS``.
"""

import linecache
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import llmprune
from llmprune.models import vocabulary

DEVICE = torch.device("lazy", 0)  # a name that PyTorch knows and nothing uses
CPU = torch.device("cpu")
_PRODUCT, _HARNESS = f"{Path(llmprune.__file__).parent}/", f"{Path(__file__).parent}/"
_aten = torch.ops.aten
_WAITS = {
    _aten._local_scalar_dense.default: "read",
    _aten.equal.default: "read",
    _aten.is_nonzero.default: "read",
    _aten._linalg_check_errors.default: "read",
    _aten.nonzero.default: "size",
    _aten.masked_select.default: "size",
    _aten.bincount.default: "size",
    _aten._unique2.default: "size",
    _aten.unique_consecutive.default: "size",
    _aten.repeat_interleave.Tensor: "size",
}
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
_COPIES = {_aten._to_copy.default, _aten.copy_.default}


class MixedDevices(RuntimeError):
    """Tensors of the pretended device were mixed with tensors on the CPU."""


class Waits:
    """How often, of which kind and where the host would have waited."""

    def __init__(self) -> None:
        """None so far."""
        self._found: Counter[tuple[str, str]] = Counter()

    def note(self, kind: str) -> None:
        """One more."""
        self._found[kind, _place()] += 1

    def of(self, *kinds: str) -> int:
        """How many of these kinds; none named = of all."""
        return sum(count for (kind, _), count in self._found.items() if not kinds or kind in kinds)

    def clear(self) -> None:
        """Begin anew."""
        self._found.clear()

    def __add__(self, other: "Waits") -> "Waits":
        """Those of both."""
        both = Waits()
        both._found = self._found + other._found
        return both

    def __repr__(self) -> str:
        lines = [f"{count} × {kind:4} at {place}" for (kind, place), count in self._found.most_common()]
        return "\n".join([f"{self.of()} waits", *lines])


_now = Waits()  # what counts at the moment


def _place() -> str:
    """The innermost line of the product, else of what called."""
    frame, other = sys._getframe(1), None
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PRODUCT):
            break
        other = other or (None if name.startswith(_HARNESS) or "site-packages" in name else frame)
        frame = frame.f_back
    found = frame or other or sys._getframe(1)
    name, number = found.f_code.co_filename, found.f_lineno
    return f"{name.removeprefix(_PRODUCT)}:{number} ({linecache.getline(name, number).strip()})"


class Pretended(Tensor):
    """A tensor on the pretended device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretended":
        """Pretend that a tensor lies on the device; it is shared, not copied."""
        made: Pretended = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )
        made.held = held.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute."""
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """Without gradient."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Pretended):
            raise MixedDevices(f"data of a CPU for a tensor on the device, at {_place()}")
        self.held = value.held

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_indices(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_indices(index), value)

    def tolist(self) -> Any:
        """A wait."""
        _now.note("read")
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refused, as by CUDA's tensors."""
        raise TypeError(f"can't convert a tensor on the device to numpy, at {_place()}")

    __array__ = numpy

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pretended":
        if id(self) not in memo:
            made = Pretended(self.held.clone())
            made.__dict__ |= {name: value for name, value in self.__dict__.items() if name != "held"}
            memo[id(self)] = made.requires_grad_(self.requires_grad)
        found: Pretended = memo[id(self)]
        return found

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.held})"


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute on the CPU what an operation would compute on the device."""
    own: list[Pretended] = []
    others: list[Tensor] = []
    _sort((*args, *kwargs.values()), own, others)
    target = kwargs.get("device")
    target = None if target is None else torch.device(target)
    if not own and (target is None or target.type != DEVICE.type):
        return func(*args, **kwargs)
    _refuse_mixing(func, args, own, others)
    _count(func, args, kwargs, own, others, target)
    at_home = {name: CPU if name == "device" and value is not None else value for name, value in kwargs.items()}
    if own and torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(f"{func} changes a tensor's shape, which can't be pretended, at {_place()}")
    found = func(*_unwrapped(args), **_unwrapped(at_home))
    if func._schema.is_mutable:
        return kwargs.get("out", args[0]) if isinstance(found, Tensor) else found
    return found if target is not None and target.type == "cpu" else _wrapped(found)


def _refuse_mixing(func: Any, args: Any, own: list[Pretended], others: list[Tensor]) -> None:
    if not own or func in _COPIES:
        return
    if func in _INDEXING:
        others = [tensor for tensor in (args[0], *args[2:3]) if isinstance(tensor, Tensor)]
        others = [tensor for tensor in others if not isinstance(tensor, Pretended)]
    if wrong := [tuple(tensor.shape) for tensor in others if tensor.dim() > 0]:
        raise MixedDevices(f"{func}: a tensor on the CPU, {wrong[0]}, with one on the device, at {_place()}")


def _count(
    func: Any, args: Any, kwargs: Any, own: list[Pretended], others: list[Tensor], target: torch.device | None
) -> None:
    if own and func in _WAITS:
        _now.note(_WAITS[func])
    elif own and func in _INDEXING:
        chosen = [index for index in args[1] if isinstance(index, Tensor)]
        fills = len(args) > 2 and args[2].numel() == 1  # with a single number no index is made of the mask
        if any(index.dtype in (torch.bool, torch.uint8) for index in chosen) and not fills:
            _now.note("size")
        if any(not isinstance(index, Pretended) and index.dim() > 0 for index in chosen):
            _now.note("copy")
    elif func is _aten.copy_.default and own and others:
        blocks = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if blocks or not isinstance(args[0], Pretended):
            _now.note("copy" if isinstance(args[0], Pretended) else "read")
    elif func is _aten._to_copy.default and target is not None:
        if own and target.type == "cpu":
            _now.note("read")
        elif others and target.type == DEVICE.type and not kwargs.get("non_blocking", False):
            _now.note("copy")


def _sort(values: Iterable[Any], own: list[Pretended], others: list[Tensor]) -> None:
    for value in values:
        if isinstance(value, Pretended):
            own.append(value)
        elif isinstance(value, Tensor):
            others.append(value)
        elif isinstance(value, list | tuple):
            _sort(value, own, others)


def _unwrapped(value: Any) -> Any:
    if isinstance(value, Pretended):
        return value.held
    if isinstance(value, list | tuple):
        return type(value)(_unwrapped(item) for item in value)
    return {name: _unwrapped(item) for name, item in value.items()} if isinstance(value, dict) else value


def _wrapped(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_wrapped(item) for item in value)
    return Pretended(value) if isinstance(value, Tensor) and not isinstance(value, Pretended) else value


def _indices(index: Any) -> Any:
    """Lists as index tensors: PyTorch's own way makes them on the device without a dispatcher."""
    each = index if isinstance(index, tuple) else (index,)
    return tuple(torch.tensor(item) if isinstance(item, list) else item for item in each)


class _Everywhere(TorchDispatchMode):
    """Sees what makes tensors on the device, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def pretended() -> Iterator[Waits]:
    """While open, the device is there; gives the waits."""
    made, taken, autocast, enabled = torch.tensor, torch.as_tensor, torch.autocast, torch.is_autocast_enabled
    product = Tensor.__matmul__

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        found = made(data, *args, **kwargs)
        return found if device is None else found.to(device)

    def as_tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        found = taken(data, *args, **kwargs)
        return found if device is None else found.to(device)

    def without(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == DEVICE.type else autocast(device_type, *args, **kwargs)

    def is_enabled(device_type: str | None = None) -> bool:
        return False if device_type == DEVICE.type else bool(enabled(*filter(None, [device_type])))

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        # PyTorch's own way from a vector and a matrix changes a tensor's shape.
        return product(a[None], b)[0] if isinstance(b, Tensor) and (a.dim(), b.dim()) == (1, 2) else product(a, b)

    swapped = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that moved parameters stay the same objects
    patches = {"tensor": tensor, "as_tensor": as_tensor, "autocast": without, "is_autocast_enabled": is_enabled}
    try:
        with ExitStack() as stack:
            for name, value in patches.items():
                stack.enter_context(mock.patch.object(torch, name, value))
            stack.enter_context(mock.patch.object(Tensor, "__matmul__", matmul))
            stack.enter_context(mock.patch.dict(vocabulary.CHUNKS, {DEVICE.type: 2**12}))
            stack.enter_context(_Everywhere())
            _now.clear()
            yield _now
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapped)
