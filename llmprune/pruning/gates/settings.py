"""The settings of pruning by gates, and the goal that they describe."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from transformers import PretrainedConfig

from llmprune.models.families import family_of, target_shape
from llmprune.pruning.gates.goals import Goal, ShapeGoal, SizeGoal
from llmprune.pruning.gates.kinds import HIDDEN, INTERMEDIATE, KV_GROUP, LAYER
from llmprune.utils.errors import UserError
from llmprune.utils.settings import limited

DEFAULT_GATES = [HIDDEN, KV_GROUP, INTERMEDIATE, LAYER]


@dataclass
class TargetShape:
    """The shape to prune to; what is left out stays as it is.

    Heads without ``kv_heads`` remove whole key/value groups, and the other way round; both together can also remove
    the same number of query heads within every group.

    Attributes:
        layers: blocks.
        attention_layers: attention sub-layers, in the blocks that stay; those that go are gated by themselves.
        mlp_layers: MLP sub-layers, in the same way.
        hidden: hidden dimensions.
        heads: query heads.
        kv_heads: key/value groups.
        intermediate: MLP channels.
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
    """What the cut model's sizes must be multiples of (hardware likes 64 or 128); heads are always kept whole."""

    hidden: int = limited(1, least=1)
    intermediate: int = limited(1, least=1)


@dataclass
class L0PruningConfig:
    """Settings of ``L0Pruning``; the defaults are Sheared-LLaMA's.

    Attributes:
        target: the shape to reach; either this or ``target_sparsity``.
        target_sparsity: share of the attention and MLP parameters that is to go, wherever they are needed least.
        gates: with ``target_sparsity``, the kinds of gates: hidden, kv_group, head, intermediate, and layer or
            attention and mlp; null = hidden, kv_group, intermediate and layer.
        multiples: what the sizes of the cut model must be multiples of; a target shape is rounded down to them.
        start_sparsity: where the target sparsity starts.
        lagrangian_warmup: how long it takes to rise to the target (``640ba``, ``0.2dur``).
        gate_lr: learning rate of the gates (log α).
        multiplier_lr: learning rate of the Lagrange multipliers, which ascend.
        evaluate_at: ``expected`` evaluates with as many gates at zero as are expected by now; ``target`` with exactly
            those of the model that would be cut now.
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
    """What the gates of a model are to come to.

    Args:
        model: its config.
        config: the settings.

    Raises:
        UserError: the target is missing, given twice, not smaller, or not possible with these gates or this family.
    """
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
