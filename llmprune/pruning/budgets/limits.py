"""Budgets: limits on the cost of a model."""

import math
import re
from collections.abc import Sequence
from typing import Protocol

import torch

from llmprune.models.families import Shape
from llmprune.models.number_formats import DTYPES, dtype_for_inference
from llmprune.models.source import longest_input
from llmprune.pruning.budgets.latency import LatencyTable
from llmprune.pruning.budgets.settings import BudgetConfig
from llmprune.pruning.budgets.shape_sizes import ShapeSizes
from llmprune.utils.errors import UserError
from llmprune.utils.settings import check_settings

_COUNTS = {"K": 10**3, "M": 10**6, "B": 10**9}
_BYTES = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS: dict[str, dict[str, int]] = {"params": _COUNTS, "memory": _BYTES, "latency": {}}
CONTEXT = 2048  # tokens, unless the settings or the model have another limit
_FEWEST = 1000  # smaller numbers above 1 are meant otherwise
TOLERANCE = 0.1  # largest relative error of a latency from the table


class Limit(Protocol):
    """One budget.

    Attributes:
        name: name of the budget: params, memory or latency.
        most: largest cost of a model, in the unit of ``cost``.
    """

    name: str
    most: float

    def cost(self, shape: Shape, blocks: Sequence[int]) -> float:
        """The cost of a model of ``shape`` whose attentions are those of the source's ``blocks``."""


class Parameters:
    """A limit on the number of parameters."""

    name = "params"

    def __init__(self, sizes: ShapeSizes, amount: str | None) -> None:
        self._sizes = sizes
        self.most = _amount(amount, "params", sizes.parameters(sizes.source))

    def cost(self, shape: Shape, blocks: Sequence[int]) -> float:
        """The number of parameters of a shape."""
        return self._sizes.parameters(shape)


class Memory:
    """A limit on the bytes of weights and a full key/value cache."""

    name = "memory"

    def __init__(self, sizes: ShapeSizes, amount: str | None, *, batch: int, context: int, itemsize: int) -> None:
        self._sizes, self._batch, self._context, self._itemsize = sizes, batch, context, itemsize
        self.most = _amount(amount, "memory", self.cost(sizes.source, range(sizes.source.layers)))

    def cost(self, shape: Shape, blocks: Sequence[int]) -> float:
        """The bytes of weights and cache of a shape."""
        cache = self._sizes.cache_bytes(
            shape, blocks, batch=self._batch, context=self._context, itemsize=self._itemsize
        )
        return self._sizes.parameters(shape) * self._itemsize + cache


class Latency:
    """A limit on the time of one token, as a share of the source's."""

    name = "latency"

    def __init__(self, table: LatencyTable, amount: str | None) -> None:
        self.table = table
        self.most = _amount(amount, "latency", 1.0)
        if 1 < self.most < math.inf:
            raise UserError(f"a latency of {amount} is no share of the source's: write a number below 1, such as 0.7")
        self._scale = 1.0

    def cost(self, shape: Shape, blocks: Sequence[int]) -> float:
        """The time of one token as a share of the source's."""
        if shape == self.table.source:
            return 1.0
        return self._scale * self.table.seconds(shape) / self.table.seconds(self.table.source)

    def agrees(self, shape: Shape, measured: float) -> bool:
        """Whether the table's share is near a built model's measured share, and that share near the budget."""
        return abs(self.cost(shape, ()) / measured - 1) <= TOLERANCE and self.is_kept(measured)

    def is_kept(self, measured: float) -> bool:
        """Whether a built model's measured share is near enough to the budget."""
        return measured <= self.most * (1 + TOLERANCE / 2)

    def learn(self, shape: Shape, measured: float) -> None:
        """Scale the table to a built model's measured share."""
        self._scale *= measured / self.cost(shape, ())


def costs_of(budget: BudgetConfig, sizes: ShapeSizes, device: torch.device) -> list[Limit]:
    """Every cost that a budget may limit; ``most`` is infinite if the budget has no such limit.

    Raises:
        UserError: a budget is no number, or the context is too long.
    """
    check_settings(budget)
    longest = longest_input(sizes.config)
    if budget.context is not None and longest is not None and budget.context > longest:
        raise UserError(f"a context of {budget.context} tokens is too long: the model takes {longest}")
    dtype, context = DTYPES[budget.dtype], budget.context or min(CONTEXT, longest or CONTEXT)
    auto = "auto" if budget.dtype == "bfloat16" else budget.dtype  # bfloat16 is not timed where it is slow
    timed = dtype_for_inference(auto, on_gpu=device.type == "cuda")
    table = LatencyTable(sizes.config, batch=budget.batch, context=context, device=device, dtype=timed)
    return [
        Parameters(sizes, budget.params),
        Memory(sizes, budget.memory, batch=budget.batch, context=context, itemsize=dtype.itemsize),
        Latency(table, budget.latency),
    ]


def limits_of(costs: Sequence[Limit], source: Shape) -> list[Limit]:
    """The costs with a limit.

    Args:
        costs: costs with and without limits, see ``costs_of``.
        source: shape of the source model.

    Raises:
        UserError: no cost has a limit, or nothing needs to be removed.
    """
    found = [cost for cost in costs if cost.most < math.inf]
    if not found:
        raise UserError("name a budget: of parameters, memory or latency")
    everything = range(source.layers)
    if all(limit.cost(source, everything) <= limit.most for limit in found):
        raise UserError("the model keeps to the budget as it is: nothing needs to go")
    return found


def _amount(text: str | None, name: str, whole: float) -> float:
    """The value of a text with a share of ``whole``, up to one, or a number with a unit; infinite for None."""
    if text is None:
        return math.inf
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*|%)\s*", text)
    unit = match[2].upper() if match else ""
    units = {"": 1, "%": 0.01 * whole, **_UNITS[name]}
    if match is None or unit not in units or float(match[1]) <= 0:
        examples = {"params": "0.75 or 1.3B", "memory": "8GB or 0.75", "latency": "0.7"}
        raise UserError(f"'{text}' is no budget of {name}: write {examples[name]}")
    number = float(match[1])
    if not unit and 1 < number < _FEWEST and name != "latency":
        raise UserError(
            f"'{text}' is no budget of {name}, because a share is at most 1: write 0.75, or a number with a unit "
            "(params: 1.3B, memory: 8GB)"
        )
    return number * whole if not unit and number <= 1 else number * units[unit]


def bytes_of(text: str, option: str) -> float:
    """A size such as ``80GB``, in bytes.

    Raises:
        UserError: the text is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    if match is None or match[2].upper() not in _BYTES:
        raise UserError(f"{option} '{text}' is no size: write 80GB")
    return float(match[1]) * _BYTES[match[2].upper()]
