"""The choice of the shape under a budget with the lowest calibration loss, of depth and width together."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from math import gcd
from typing import Any

from llmprune.models.families import Shape
from llmprune.plans.plan import Plan
from llmprune.pruning.budgets.limits import Latency, Limit
from llmprune.pruning.budgets.plan_losses import PlanLosses
from llmprune.pruning.budgets.shape_sizes import ShapeSizes, of_size, prunable_dimensions
from llmprune.utils.errors import UserError
from llmprune.utils.progress import Progress

LARGEST_MULTIPLE = 256
SHARES = (1.0, 0.75, 0.5, 0.875, 0.625)
SMALL_SHARES = (0.375, 0.25, 0.125, 0.0)  # used if none of the others keeps to the budget; 0 = the smallest size
CHECKS = 4  # times that a latency is measured on a built model to correct the table

log = logging.getLogger(__name__)


class NoShapeError(UserError):
    """No removal that is allowed keeps to the budget."""


@dataclass(frozen=True)
class Choice:
    """A shape that keeps to the budget.

    Attributes:
        plan: plan with the chosen shape.
        loss: loss on the calibration samples before any recovery, in nats per token.
        costs: predicted costs, by name of the budget.
        measured: latency of a built model as a share of the source's; None = no budget of latency, or too little
            memory.
        tried: number of shapes that were compared.
        losses: losses of the plan as it is written; None = the plan is not yet written.
    """

    plan: Plan
    loss: float
    costs: Mapping[str, float]
    measured: float | None
    tried: int
    losses: PlanLosses | None = None

    def facts(self) -> dict[str, Any]:
        """The data of the choice, for JSON."""
        return {
            "shape": asdict(self.plan.shape),
            "loss": self.loss,
            "costs": dict(self.costs),
            "measured_latency": self.measured,
            "tried": self.tried,
            **({} if self.losses is None else self.losses.facts()),
        }

    def __str__(self) -> str:
        words = {"params": "{:,.0f} parameters", "memory": "{:,.0f} bytes", "latency": "{:.3f} of the source's latency"}
        costs = [words[name].format(cost) for name, cost in self.costs.items()]
        if self.measured is not None:
            costs.append(f"a built model takes {self.measured:.3f}")
        shown = ", ".join(costs)
        return (
            f"{self.plan.shape}: {shown}; {self.tried} shapes tried; "
            f"{self.losses or f'calibration loss before recovery {self.loss:.4f}'}"
        )


@dataclass(frozen=True)
class Steps:
    """The sizes that a shape may have, by dimension, in ascending order.

    ``inner``, the MLP channels or experts, is not searched but computed: the largest number within the budget. With
    ``whole_heads``, the number of query heads in a group, hidden is a multiple of all heads.
    """

    layers: Sequence[int]
    hidden: Sequence[int]
    groups: Sequence[int]
    inner: Sequence[int]
    inner_name: str
    coupled: bool
    whole_heads: int | None = None

    @classmethod
    def of(cls, sizes: ShapeSizes, multiple: int | None, least_layers: int, *, depth: bool, width: bool) -> "Steps":
        """The possible sizes of a model's shape.

        Args:
            sizes: sizes of the source model.
            multiple: number that hidden dimensions and channels are multiples of; None = chosen by their size.
            least_layers: number of blocks that can't be removed.
            depth: whether blocks are removed.
            width: whether heads, channels, hidden dimensions or experts are removed.
        """
        source, family = sizes.source, sizes.family
        layers = range(least_layers if depth else source.layers, source.layers + 1)
        *_, inner = prunable_dimensions(sizes.config)
        coupled = family.head_size_is_derived(sizes.config)
        if not width:
            return cls(layers, [source.hidden], [source.kv_heads], [getattr(source, inner)], inner, coupled)
        hidden = [n for n in range(1, source.hidden + 1) if n % _multiple(source.hidden, multiple) == 0]
        groups = list(range(1, source.kv_heads + 1))
        whole_heads = source.heads_per_group if family.keeps_whole_heads(sizes.config) else None
        if whole_heads is not None:
            hidden = sorted({n for g in groups for n in _whole(source.hidden, g * whole_heads, multiple)})
        if coupled:
            wanted = {n * source.head_dim * source.heads_per_group for n in groups}
            hidden = sorted(wanted) if multiple is None else [n for n in sorted(wanted) if n % multiple == 0]
        channels = source.intermediate
        if source.experts is not None:
            chosen = getattr(sizes.config, family.chosen_experts) if family.chosen_experts else 1
            inners = list(range(chosen, source.experts + 1))
        else:
            inners = [n for n in range(1, channels + 1) if n % _multiple(channels, multiple) == 0]
        for name, values in (("hidden", hidden), (inner, inners)):
            if not values:
                raise UserError(
                    f"no size of {name} up to the model's is a multiple of {multiple}: choose a smaller one"
                )
        return cls(layers, hidden, groups, inners, inner, coupled, whole_heads)

    def fits(self, hidden: int, groups: int) -> bool:
        """Whether the sizes at the places ``hidden`` and ``groups`` can be combined."""
        return self.whole_heads is None or self.hidden[hidden] % (self.groups[groups] * self.whole_heads) == 0


def _whole(size: int, heads: int, multiple: int | None) -> Iterator[int]:
    """Hidden sizes that are multiples of the heads, and of a power of two with at least eight such sizes."""
    step = multiple or _multiple(size, None)
    while multiple is None and step > 1 and math.lcm(step, heads) > size // 8:
        step //= 2
    yield from range(math.lcm(step, heads), size + 1, math.lcm(step, heads))


def _multiple(size: int, wanted: int | None) -> int:
    if wanted is not None:
        return wanted
    power = gcd(size, LARGEST_MULTIPLE)
    while power > 1 and power > size // 16:
        power //= 2
    return power


Point = tuple[int, int, int]  # indices into Steps' layers, hidden and groups


class Chooser:
    """A search for the best shape: first a few spread over depth and width, then neighbours of the best."""

    def __init__(
        self,
        source: Shape,
        steps: Steps,
        limits: Sequence[Limit],
        plan_for: Callable[[Shape], Plan],
        loss: Callable[[Plan], float],
        tries: int,
        depth_share: float | None = None,
    ) -> None:
        """Store the sizes, the budgets and the functions.

        Args:
            source: shape of the source model, with the number of tokens that stay.
            steps: sizes that a shape may have.
            limits: budgets that a shape must keep to.
            plan_for: function from a shape to the plan with this shape.
            loss: function from a plan to the loss of the pruned model on calibration samples.
            tries: largest number of losses to compute.
            depth_share: share of the blocks that would go alone, which goes; None = any number.
        """
        self._source, self._steps, self._limits, self._tries = source, steps, limits, tries
        self._every, self._depth_share = steps.layers, depth_share
        self._plan_for, self._loss = plan_for, loss
        self._losses: dict[Shape, float] = {}
        self._blocks: dict[int, list[int]] = {}

    def choose(self) -> Choice:
        """The best shape found.

        Raises:
            UserError: no shape keeps to the budget.
        """
        latency = next((limit for limit in self._limits if isinstance(limit, Latency)), None)
        for remaining in reversed(range(CHECKS)):
            if self._depth_share is not None:
                self._steps = replace(self._steps, layers=[self._shared_depth(self._depth_share)])
            shape = self._best()
            if latency is None:
                return self._choice(shape, None)
            measured = latency.table.measured(shape, self._source)
            if measured is None or latency.agrees(shape, measured):
                return self._choice(shape, measured)
            if not remaining:
                log.warning("a built model takes %.3f of the source's time, not %.3f", measured, latency.most)
                return self._choice(shape, measured)
            latency.learn(shape, measured)
        raise AssertionError("the last check returns")

    def _shared_depth(self, share: float) -> int:
        """The number of blocks that stay, if ``share`` of those go that would go without any loss of width."""
        source, least = self._source.layers, self._every[0]
        whole = (n for n in reversed(self._every) if self._fits(of_size(self._source, {"layers": n})))
        return max(source - round(share * (source - next(whole, least))), least)

    def _choice(self, shape: Shape, measured: float | None) -> Choice:
        costs = {limit.name: self._cost(limit, shape) for limit in self._limits}
        return Choice(self._plan_for(shape), self._losses[shape], costs, measured, len(self._losses))

    def _best(self) -> Shape:
        tried: dict[Point, float] = {}
        began = len(self._losses)
        with Progress(desc="choosing the shape", total=self._tries, unit="shapes") as progress:

            def attempt(point: Point) -> None:
                point = self._raised(point)
                shape = None if point in tried else self._solved(point)
                if shape is None:
                    return
                if shape not in self._losses:
                    if tried and len(self._losses) - began >= self._tries:
                        return
                    self._losses[shape] = self._loss(self._plan_for(shape))
                    progress.update()
                tried[point] = self._losses[shape]

            for point in self._spread(SHARES):
                attempt(point)
            if not tried:
                for point in self._spread((*SHARES, *SMALL_SHARES)):
                    attempt(point)
            if not tried:
                raise NoShapeError(
                    "no shape keeps to the budget: raise it, protect fewer blocks, or allow smaller multiples"
                )
            while True:
                best = min(tried, key=lambda point: tried[point])
                for point in self._neighbours(best):
                    attempt(point)
                if min(tried, key=lambda point: tried[point]) == best:
                    break
        shape = self._solved(best)
        assert shape is not None
        return shape

    def _spread(self, shares: Sequence[float]) -> Iterator[Point]:
        """Points of all combinations of depth and width, each at one of the given shares of the source's sizes."""
        lengths = len(self._steps.layers), len(self._steps.hidden), len(self._steps.groups)
        points = []
        places = sorted(product(range(len(shares)), repeat=2), key=lambda pair: (sum(pair), abs(pair[0] - pair[1])))
        for of_layers, of_width in ((shares[i], shares[j]) for i, j in places):  # even the first few vary both
            depth = round(self._source.layers * of_layers) - self._steps.layers[0]
            hidden, groups = (max(round(length * of_width) - 1, 0) for length in lengths[1:])
            points.append((min(max(depth, 0), lengths[0] - 1), hidden, groups))
        return (self._tied(point) for point in dict.fromkeys(points))

    def _tied(self, point: Point) -> Point:
        """The point with groups that fit its hidden dimensions, if the head size is always hidden / heads."""
        layers, hidden, groups = point
        if self._steps.coupled:
            size = self._source.head_dim * self._source.heads_per_group
            groups = self._steps.groups.index(self._steps.hidden[hidden] // size)
        places = (place for place in range(len(self._steps.hidden)) if self._steps.fits(place, groups))
        return layers, min(places, key=lambda place: abs(place - hidden), default=hidden), groups

    def _neighbours(self, point: Point) -> Iterator[Point]:
        lengths = len(self._steps.layers), len(self._steps.hidden), len(self._steps.groups)
        for axis in range(2 if self._steps.coupled else 3):
            for step in (-1, 1):
                moved = [place + step * (number == axis) for number, place in enumerate(point)]
                if axis == 1:  # to the next size that fits the groups
                    while 0 <= moved[1] < lengths[1] and not self._steps.fits(moved[1], moved[2]):
                        moved[1] += step
                if all(0 <= place < length for place, length in zip(moved, lengths, strict=True)):
                    yield self._tied((moved[0], moved[1], moved[2]))

    def _raised(self, point: Point) -> Point:
        """The point with as many blocks as keep to every budget, if blocks of full width do; else the same point."""
        low, hidden, groups = point
        high = len(self._steps.layers)  # blocks of full width fit at low, if at all, and not at high
        while self._has_full_width((low, hidden, groups)) and high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._has_full_width((middle, hidden, groups)) else (low, middle)
        return low, hidden, groups

    def _has_full_width(self, point: Point) -> bool:
        """Whether every channel, or expert, may stay at a point."""
        shape = self._solved(point)
        return shape is not None and getattr(shape, self._steps.inner_name) == self._steps.inner[-1]

    def _solved(self, point: Point) -> Shape | None:
        """The largest shape at a point that keeps to every budget; None if there is none."""
        steps = self._steps
        if not steps.fits(point[1], point[2]):
            return None
        sizes = {
            "layers": steps.layers[point[0]],
            "hidden": steps.hidden[point[1]],
            "kv_heads": steps.groups[point[2]],
        }
        low, high = 0, len(steps.inner)  # inner[:low] fit, inner[high:] don't
        while low < high:
            middle = (low + high) // 2
            if self._fits(of_size(self._source, {**sizes, steps.inner_name: steps.inner[middle]})):
                low = middle + 1
            else:
                high = middle
        return of_size(self._source, {**sizes, steps.inner_name: steps.inner[low - 1]}) if low else None

    def _fits(self, shape: Shape) -> bool:
        return all(self._cost(limit, shape) <= limit.most for limit in self._limits)

    def _cost(self, limit: Limit, shape: Shape) -> float:
        if shape.layers not in self._blocks:
            whole = of_size(self._source, {"layers": shape.layers})
            self._blocks[shape.layers] = [block.attention for block in self._plan_for(whole).blocks]
        return limit.cost(shape, self._blocks[shape.layers])
