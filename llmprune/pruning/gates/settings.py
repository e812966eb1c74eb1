"""The settings of pruning by gates, and the goal made from them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from transformers import PretrainedConfig

from llmprune.models.families import family_of, refuse_skipped, target_shape
from llmprune.pruning.gates.goals import Goal, ShapeGoal, SizeGoal
from llmprune.pruning.gates.kinds import HIDDEN, INTERMEDIATE, KV_GROUP, LAYER
from llmprune.utils.errors import UserError
from llmprune.utils.settings import limited

DEFAULT_GATES = [HIDDEN, KV_GROUP, INTERMEDIATE, LAYER]


@dataclass
class TargetShape:
    """The shape to prune to; sizes that are not given stay as they are.

    ``heads`` without ``kv_heads`` removes whole key/value groups, and so does ``kv_heads`` without ``heads``; both
    together can also remove the same number of query heads within every group.

    Attributes:
        layers: number of blocks that stay; null = all.
        attention_layers: number of attention sub-layers that stay, within the blocks that stay; removed ones have gates
            of their own; null = all.
        mlp_layers: number of MLP sub-layers that stay, within the blocks that stay; removed ones have gates of their
            own; null = all.
        hidden: number of hidden dimensions that stay; null = all.
        heads: number of query heads that stay in every block; null = all, or as ``kv_heads`` requires.
        kv_heads: number of key/value groups that stay in every block; null = all, or as ``heads`` requires.
        intermediate: number of MLP channels that stay in every block; null = all.
    """

    layers: int | None = None
    attention_layers: int | None = None
    mlp_layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    intermediate: int | None = None


@dataclass
class Multiples:
    """The numbers that sizes of the pruned model are multiples of (64 or 128 suit hardware); heads stay whole.

    Attributes:
        hidden: the hidden size is a multiple of this number.
        intermediate: the number of MLP channels is a multiple of this number.
    """

    hidden: int = limited(1, least=1)
    intermediate: int = limited(1, least=1)


@dataclass
class L0PruningConfig:
    """Settings of ``L0Pruning``; the defaults are Sheared-LLaMA's.

    Attributes:
        target: shape to prune to; give either this or ``target_sparsity``.
        target_sparsity: share of the attention and MLP parameters to remove, from the places where they are least
            needed.
        gates: kinds of gates, only with ``target_sparsity``: hidden, kv_group, head, intermediate, and layer or
            attention and mlp; null = hidden, kv_group, intermediate and layer.
        multiples: numbers that the sizes of the pruned model are multiples of; a target shape is rounded down to them.
        start_sparsity: target sparsity at the start of the warm-up.
        lagrangian_warmup: time in which the target sparsity rises to its final value, such as ``640ba`` or ``0.2dur``.
        gate_lr: learning rate of the gates (log α).
        multiplier_lr: learning rate of the Lagrange multipliers, which are updated by gradient ascent.
        evaluate_at: gates in evaluations: ``expected`` = as many at zero as expected now; ``target`` = exactly those of
            the model that would be cut now.
    """

    target: TargetShape | None = None
    target_sparsity: float | None = None
    gates: list[str] | None = None
    multiples: Multiples = field(default_factory=Multiples)
    start_sparsity: float = limited(0.0, least=0, below=1)
    lagrangian_warmup: str = "0.2dur"
    gate_lr: float = limited(1.0, least=0)
    multiplier_lr: float = limited(1.0, least=0)
    evaluate_at: Literal["expected", "target"] = "expected"


def make_goal(model: PretrainedConfig, config: L0PruningConfig) -> Goal:
    """The goal of pruning for a model: a shape or a sparsity.

    Args:
        model: config of the model.
        config: settings of pruning by gates.

    Raises:
        UserError: the target is missing, given twice, not smaller, or not possible with these gates or this family.
    """
    refuse_skipped(model, "gated")
    family = family_of(model)
    source = family.shape(model)
    wanted, multiples = vars(config.target or TargetShape()), vars(config.multiples)
    for name, multiple in multiples.items():
        if multiple > getattr(source, name):
            raise UserError(
                f"l0_pruning.multiples.{name} {multiple} must lie between 1 and the source's {getattr(source, name)}"
            )
    shape_given = any(value is not None for value in wanted.values())
    if config.target_sparsity is None:
        if not shape_given:
            raise UserError("give either l0_pruning.target (a shape) or l0_pruning.target_sparsity")
        if config.gates is not None:
            raise UserError("l0_pruning.gates goes with target_sparsity; with a target shape the shape decides")
        sublayers = {name: wanted[name] for name in ("attention_layers", "mlp_layers")}
        dimensions = {name: value for name, value in wanted.items() if name not in sublayers}
        if all(value is None for value in dimensions.values()):
            dimensions["layers"] = source.layers
        for name, multiple in multiples.items():
            if (value := dimensions[name]) is not None and value % multiple:
                dimensions[name] = max(value // multiple, 1) * multiple
        target = target_shape(source, dimensions)
        family.check_shape(model, target)
        goal: Goal = ShapeGoal(source, target, **sublayers)
        _refuse_gates(family.name, goal.kinds, family.refused(model))
        return goal
    if shape_given:
        raise UserError("give either l0_pruning.target (a shape) or l0_pruning.target_sparsity, not both")
    kinds = tuple(DEFAULT_GATES if config.gates is None else config.gates)
    refused = family.refused(model)
    if config.gates is None:
        kinds = tuple(kind for kind in kinds if kind not in refused)
    _refuse_gates(family.name, kinds, refused)
    return SizeGoal(
        source,
        family.matrices(model),
        kinds,
        config.target_sparsity,
        multiples,
        coupled=family.head_size_is_derived(model),
        whole_heads=family.keeps_whole_heads(model),
    )


def _refuse_gates(family: str, kinds: Iterable[str], refused: Mapping[str, str]) -> None:
    for kind in kinds:
        if kind in refused:
            raise UserError(f"{family} models can't have {kind} gates: {refused[kind]}")
