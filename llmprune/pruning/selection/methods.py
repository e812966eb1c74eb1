"""Methods that select the blocks of a plan from scores; other packages can register more."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.models.families import target_shape
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.pruning.scoring.scores import Scores
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.pruning.selection.width import narrowed, whole
from llmprune.utils.errors import UserError
from llmprune.utils.registry import Registry


@dataclass(frozen=True)
class ScoredModel:
    """The scored model in memory, for methods that run it again.

    Attributes:
        model: model in memory, in evaluation mode; merging changes its weights.
        samples: calibration samples of the scores, [samples, length]; None = the scores needed none.
        batch_size: number of samples that pass through a block at a time.
        tokenizer: tokenizer of the samples, for plans that take tokens; None = no such plans.
    """

    model: PreTrainedModel
    samples: Tensor | None
    batch_size: int
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def tokens(self) -> Tensor:
        """The calibration samples.

        Raises:
            UserError: the scores were computed without samples.
        """
        if self.samples is None:
            raise UserError("the scores were computed without calibration text: score again with --data")
        return self.samples


@dataclass(frozen=True)
class Request:
    """A request for a selection of blocks.

    Attributes:
        scores: scores of the model.
        config: settings of the plan.
        open: function that opens the scored model with its calibration samples.
        parallel: whether attention and MLP of a block read the same input.
        tokens: function that returns the tokens that stay, of a given number.
    """

    scores: Scores
    config: PlanConfig
    open: Callable[[], ScoredModel]
    parallel: bool
    tokens: Callable[[int], tuple[int, ...]]

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return self.scores.layers

    @cached_property
    def criterion(self) -> str:
        """The name of the criterion whose scores are used.

        Raises:
            UserError: no criterion was named.
        """
        if self.config.criterion is None:
            known = ", ".join([*self.scores.blocks, *self.scores.spans])
            raise UserError(
                f"name the criterion that decides with --criterion (plan.criterion in a YAML); the scores have {known}"
            )
        return self.config.criterion

    @cached_property
    def remove(self) -> int:
        """The number of blocks to remove.

        Raises:
            UserError: the number is missing, or no block would stay.
        """
        count = self.config.remove
        if count is None:
            raise UserError("say how many blocks go with --remove (plan.remove in a YAML)")
        if not 1 <= count < self.layers:
            raise UserError(f"{count} of {self.layers} blocks can't be removed: choose 1 to {self.layers - 1}")
        return count

    def removable(self, default: int = 0) -> list[int]:
        """The numbers of the blocks that are not protected.

        Args:
            default: number of protected blocks at each end if the settings have none.

        Raises:
            UserError: too few blocks are not protected, or too many are to be removed.
        """
        wanted = 1 if self.config.remove is None else self.remove
        ends = self.config.protect_first, self.config.protect_last
        first, last = (default if end is None else end for end in ends)
        blocks = list(range(first, self.layers - last))
        if len(blocks) < wanted:
            raise UserError(
                f"with the first {first} and the last {last} blocks protected only {len(blocks)} of {self.layers} can "
                f"go, not {wanted}"
            )
        return blocks


Selection = Callable[[Request], tuple[KeptBlock, ...]]
SELECTIONS: Registry[Selection] = Registry("selections", "way to select")


def select(request: Request) -> Plan:
    """The plan that a request describes, without corrections.

    Raises:
        UserError: the request is impossible.
    """
    config, scores = request.config, request.scores
    config.check()
    if config.shape is None and (config.unit_criterion or config.expert_criterion):
        raise UserError("a criterion of units goes with a shape: name it with --shape")
    plan = Plan(scores.family, scores.fingerprint, scores.source, selected_blocks(request))
    if config.shape is not None:
        plan = _of_shape(plan, request)
    return plan


def _of_shape(plan: Plan, request: Request) -> Plan:
    """The plan with the width and the tokens of the wanted shape."""
    config, scores = request.config, request.scores
    target = target_shape(scores.source, {**config.sizes, "layers": len(plan.blocks)})
    plan = narrowed(plan, target, scores, config.unit_criterion, config.expert_criterion)
    if target.vocabulary is not None and target.vocabulary != scores.source.vocabulary:
        plan = replace(plan, vocabulary=request.tokens(target.vocabulary))
    if plan.shape == scores.source and not config.sublayers:
        raise UserError("the shape is the model's own: nothing would go")
    return plan


def calibration_size(data: Mapping[str, Any]) -> tuple[int, int]:
    """The number of calibration samples of scores, and the number of tokens in each.

    Args:
        data: settings of the calibration samples, from the scores.

    Raises:
        UserError: the numbers are missing, or there were no samples.
    """
    samples, length = data.get("samples"), data.get("length")
    if not isinstance(samples, int) or not isinstance(length, int):
        raise UserError("the scores were computed without calibration text: score again with --data")
    return samples, length


def selected_blocks(request: Request) -> tuple[KeptBlock, ...]:
    """The blocks that stay, unchanged."""
    config, layers = request.config, request.layers
    depth = config.of_depth(layers)
    if depth is not None:
        return SELECTIONS[config.method](replace(request, config=depth))
    if config.criterion is not None:
        raise UserError("no blocks go: leave out the criterion of blocks, or say how many go")
    return whole(layers)


def without(layers: int, removed: Sequence[int]) -> tuple[KeptBlock, ...]:
    """All blocks except ``removed``."""
    return tuple(block for block in whole(layers) if block.attention not in removed)


def lowest_blocks(scores: Sequence[float], removable: Sequence[int], count: int) -> list[int]:
    """The removable blocks with the lowest scores; among equal scores, the later blocks."""
    return sorted(sorted(removable, key=lambda block: (scores[block], -block))[:count])


def no_criterion(request: Request) -> None:
    """Refuse a criterion if the method does not use one.

    Raises:
        UserError: a criterion was named.
    """
    if request.config.criterion is not None:
        raise UserError(f"'{request.config.method}' decides by itself: leave out the criterion")


@SELECTIONS.register("lowest")
def lowest(request: Request) -> tuple[KeptBlock, ...]:
    """The blocks with the lowest scores are removed."""
    scores = request.scores.of_blocks(request.criterion)
    return without(request.layers, lowest_blocks(scores, request.removable(), request.remove))


@SELECTIONS.register("span")
def span(request: Request) -> tuple[KeptBlock, ...]:
    """One span of neighbouring blocks is removed: that with the most similar ends, or the lowest sum of scores."""
    count, removable, scores = request.remove, request.removable(), request.scores
    starts = [block for block in removable if block + count - 1 in removable]
    if not starts:
        raise UserError(f"no span of {count} blocks lies within the {len(removable)} that are not protected")
    name = request.criterion
    if name in scores.spans:
        lengths = scores.of_spans(name)[str(count)]
        cost = [-value if name == "cosine" else value for value in lengths]
    else:
        blocks = scores.of_blocks(name)
        cost = [sum(blocks[start : start + count]) for start in range(request.layers - count + 1)]
    start = min(starts, key=lambda place: cost[place])
    return without(request.layers, range(start, start + count))


@SELECTIONS.register("list")
def explicit(request: Request) -> tuple[KeptBlock, ...]:
    """The listed blocks are removed, or single attentions and MLPs if a config can describe the rest."""
    listed = request.config.drop
    if not listed:
        raise UserError("list what goes with --drop: 3,7 or attention.3,mlp.2")
    config = request.config
    for name, given in (
        ("--remove", config.remove),
        ("--protect-first", config.protect_first),
        ("--protect-last", config.protect_last),
        ("--criterion", config.criterion),
    ):
        if given is not None:
            raise UserError(f"the list says what goes: leave out {name}")
    gone: set[tuple[int, str]] = set()
    for item in listed:
        kind, _, number = str(item).rpartition(".")
        if not number.isdecimal() or kind not in ("", "attention", "mlp"):
            raise UserError(f"'{item}' is neither a block's number nor attention.N or mlp.N")
        if int(number) >= request.layers:
            raise UserError(f"there is no block {number}: the model has {request.layers}, from 0")
        gone |= {(int(number), name) for name in ([kind] if kind else ["attention", "mlp"])}
    return pair_sublayers(request, gone)


def pair_sublayers(request: Request, gone: set[tuple[int, str]]) -> tuple[KeptBlock, ...]:
    """The blocks made of the sub-layers that stay, each an attention and the MLP after it.

    Args:
        request: request, for the model's number of blocks and layout.
        gone: sub-layers to remove: (block, ``attention`` or ``mlp``).

    Raises:
        UserError: no config can describe the result.
    """
    order = [(block, name) for block in range(request.layers) for name in ("attention", "mlp")]
    kept = [sublayer for sublayer in order if sublayer not in gone]
    for place, (block, name) in enumerate(kept):
        if name != ("attention", "mlp")[place % 2] or (place == len(kept) - 1 and name == "attention"):
            raise UserError(
                f"the {name} of block {block} would stay without a partner, which no {request.scores.family} config "
                "can express: what goes must be pairs of neighbours, such as attention.3,mlp.3 or mlp.3,attention.4"
            )
    blocks = tuple(KeptBlock(attention, mlp) for (attention, _), (mlp, _) in zip(kept[::2], kept[1::2], strict=True))
    if request.parallel and any(block.attention != block.mlp for block in blocks):
        raise UserError(
            f"attention and MLP of this {request.scores.family} model's blocks read the same input: they go together"
        )
    return blocks


@SELECTIONS.register("sublayers")
def sublayers(request: Request) -> tuple[KeptBlock, ...]:
    """The pairs of neighbouring sub-layers with the lowest sum of influences are removed, also across blocks."""
    no_criterion(request)
    if request.parallel:
        raise UserError(
            f"attention and MLP of this {request.scores.family} model's blocks read the same input: no pair of "
            "neighbours but a whole block can go"
        )
    influence = {name: request.scores.subblocks.get(name) for name in ("attention", "mlp")}
    attention, mlp = influence["attention"], influence["mlp"]
    if attention is None or mlp is None:
        raise UserError("the scores have no influence of sub-layers: score again with the criteria attention and mlp")
    removable = request.removable()
    order = [(block, name) for block in removable for name in ("attention", "mlp")]
    costs = [(attention if name == "attention" else mlp)[block] for block, name in order]
    gone = cheapest_pairs(costs, request.remove)
    return pair_sublayers(request, {order[place] for pair in gone for place in (pair, pair + 1)})


def cheapest_pairs(costs: Sequence[float], count: int) -> list[int]:
    """The places of ``count`` pairs of neighbours that do not overlap and cost least together, by dynamic programming.

    Removing one pair of neighbours after the other can make other places neighbours. A run of any even length is a row
    of such pairs, so it is enough to consider pairs that are neighbours at the start.
    """
    infinity = float("inf")
    best = [[0.0] + [infinity] * count for _ in range(len(costs) + 1)]
    for end in range(2, len(costs) + 1):
        for pairs in range(1, count + 1):
            with_pair = best[end - 2][pairs - 1] + costs[end - 2] + costs[end - 1]
            best[end][pairs] = min(best[end - 1][pairs], with_pair)
    found, end, pairs = [], len(costs), count
    while pairs:
        if best[end][pairs] == best[end - 1][pairs]:
            end -= 1
            continue
        found.append(end - 2)
        end, pairs = end - 2, pairs - 1
    return found[::-1]
