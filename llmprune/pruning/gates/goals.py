"""The goals of gates: a shape, or a size. A goal is arithmetic on probabilities and has no state."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from llmprune.models.families import Shape
from llmprune.pruning.gates.kinds import (
    ATTENTION,
    HEAD,
    HIDDEN,
    INTERMEDIATE,
    KV_GROUP,
    LAYER,
    MLP,
    check_kinds,
    gate_sizes,
)
from llmprune.pruning.gates.uniform_shape import prunable_size, uniform_counts
from llmprune.utils.errors import UserError


class Goal(Protocol):
    """A goal that gates should reach.

    Attributes:
        kinds: kinds of gates that the goal needs.
        targets: target sparsity of every constraint, by name.
        rows: shape of every constraint's multipliers (one for each row), by name.
    """

    kinds: tuple[str, ...]
    targets: dict[str, float]
    rows: dict[str, tuple[int, ...]]

    def sparsity(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Expected sparsity of every constraint, one value per row, from each kind's keep probabilities."""
        ...

    def counts(self, keep: Mapping[str, Tensor]) -> list[dict[str, int]]:
        """The numbers of gates that may stay in every row of the pruned model, by kind; the best guess first."""
        ...


class ShapeGoal:
    """A target shape: every row of every kind has its own constraint, so that each block reaches the shape."""

    def __init__(
        self, source: Shape, target: Shape, attention_layers: int | None = None, mlp_layers: int | None = None
    ) -> None:
        """Create the goal of pruning ``source`` to ``target``, with one kind of gates for every dimension that shrinks.

        Args:
            source: shape of the model.
            target: shape to reach.
            attention_layers: number of attention sub-layers that stay; None = those of all blocks that stay.
            mlp_layers: number of MLP sub-layers that stay; None = those of all blocks that stay.

        Raises:
            UserError: nothing shrinks, or these gates can't be combined.
        """
        self._sizes = gate_sizes(source)
        keep = {
            HIDDEN: target.hidden,
            KV_GROUP: target.kv_heads,
            HEAD: target.heads_per_group,
            INTERMEDIATE: target.intermediate,
            LAYER: target.layers,
            ATTENTION: target.layers if attention_layers is None else attention_layers,
            MLP: target.layers if mlp_layers is None else mlp_layers,
        }
        for name, count in (("attention_layers", attention_layers), ("mlp_layers", mlp_layers)):
            if count is not None and not 1 <= count <= target.layers:
                raise UserError(f"target {name} {count} must lie between 1 and the {target.layers} blocks that stay")
        self._keep = {
            kind: count
            for kind, count in keep.items()
            if count < (target.layers if kind in (ATTENTION, MLP) else self._sizes[kind][-1])
        }
        if not self._keep:
            raise UserError(f"the target shape is the source's own ({source}): nothing to prune")
        check_kinds(self._keep)
        self.kinds = tuple(self._keep)
        self.targets = {kind: 1 - count / self._sizes[kind][-1] for kind, count in self._keep.items()}
        self.rows = {kind: self._sizes[kind][:-1] for kind in self.kinds}
        self._target = target

    def sparsity(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Expected share of zeros in every row of every kind; a sub-layer stays only if its block stays."""
        alive = dict(keep)
        if LAYER in keep:
            alive |= {kind: keep[kind] * keep[LAYER] for kind in (ATTENTION, MLP) if kind in keep}
        return {kind: 1 - alive[kind].mean(-1) for kind in self.kinds}

    def counts(self, keep: Mapping[str, Tensor]) -> list[dict[str, int]]:
        """The counts of the target shape."""
        return [dict(self._keep)]

    def __str__(self) -> str:
        sublayers = [f"{kind}_layers {self._keep[kind]}" for kind in (ATTENTION, MLP) if kind in self._keep]
        return ", ".join([str(self._target), *sublayers])


SIZE = "size"


class SizeGoal:
    """A target sparsity of all attention and MLP parameters, with one constraint, so that blocks may differ."""

    def __init__(
        self,
        source: Shape,
        matrices: Mapping[str, int],
        kinds: tuple[str, ...],
        sparsity: float,
        multiples: Mapping[str, int] | None = None,
        *,
        coupled: bool = False,
        whole_heads: bool = False,
    ) -> None:
        """Create the goal for these kinds of gates.

        Args:
            source: shape of the model.
            matrices: number of matrices of each kind in a block (``Family.matrices``).
            kinds: kinds of gates.
            sparsity: share of the prunable parameters to remove.
            multiples: numbers that the counts in the pruned model must be multiples of, by kind.
            coupled: whether the config's head size is always hidden / heads, so that both shrink together.
            whole_heads: whether hidden must be a multiple of the heads.

        Raises:
            UserError: these gates can't be combined, have no effect in this model, or can't remove so much.
        """
        check_kinds(kinds)
        sizes = gate_sizes(source)
        for kind in kinds:
            if sizes[kind][-1] == 1:
                raise UserError(f"gates of the kind {kind} have nothing to remove: this model has one only")
        if coupled and len({HIDDEN, KV_GROUP} & set(kinds)) == 1:
            raise UserError(
                f"this model's config takes hidden / heads for the head size, {source.head_dim}, so hidden and heads "
                "shrink together: choose gates on both hidden and kv_group, or on neither"
            )
        self.kinds = tuple(kind for kind in sizes if kind in kinds)
        self.targets = {SIZE: sparsity}
        self.rows: dict[str, tuple[int, ...]] = {SIZE: ()}
        self._source, self._matrices = source, matrices
        self._multiples, self._coupled, self._whole_heads = dict(multiples or {}), coupled, whole_heads
        self._full = float(prunable_size(source, matrices, {HIDDEN: torch.ones(sizes[HIDDEN])}))
        self._check_reachable(sparsity)

    def _check_reachable(self, sparsity: float) -> None:
        """Refuse a sparsity that these gates can't reach while one unit of each row stays."""
        sizes = gate_sizes(self._source)
        least = {kind: torch.ones(sizes[kind]) / sizes[kind][-1] for kind in self.kinds}
        limit = 1 - float(prunable_size(self._source, self._matrices, least)) / self._full
        if not 0 < sparsity < limit:
            raise UserError(
                f"target_sparsity {sparsity} must lie between 0 and {limit:.3f}, the most that gates on "
                f"{', '.join(self.kinds)} can remove of this model's attention and MLP parameters"
            )

    def sparsity(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Expected share of the prunable parameters that are removed."""
        return {SIZE: 1 - prunable_size(self._source, self._matrices, keep) / self._full}

    def counts(self, keep: Mapping[str, Tensor]) -> list[dict[str, int]]:
        """The counts of the uniform shapes of the target size that are nearest to the learned gates."""
        return uniform_counts(
            self._source, self._matrices, keep, self.targets[SIZE], self._multiples, self._coupled, self._whole_heads
        )

    def __str__(self) -> str:
        return f"{self.targets[SIZE]:.1%} of the attention and MLP parameters removed by {', '.join(self.kinds)}"
