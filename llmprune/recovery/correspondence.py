"""The correspondence between the blocks and hidden dimensions of a student and those of its teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmprune.models.families import Shape
from llmprune.plans.plan import Plan
from llmprune.utils.errors import UserError


@dataclass(frozen=True)
class Correspondence:
    """How a student's hidden states are compared with its teacher's.

    Attributes:
        blocks: mapping from a student's block to the teacher's block after which the residual stream should be the
            same.
        before: mapping from a student's block to the teacher's block after which the residual stream is the block's
            input; -1 = the embeddings are.
        hidden: numbers of the teacher's hidden dimensions that the student has, in the student's order, int64 [hidden];
            None = all.
        factor: factors of the teacher's states, because the student's weights contain these factors, [hidden]; None =
            no factors.
    """

    blocks: dict[int, int]
    before: dict[int, int] = field(default_factory=dict)
    hidden: Tensor | None = None
    factor: Tensor | None = None

    def needed(self, *, local: bool) -> set[int]:
        """The teacher's blocks after which its states are read; ``local`` = also those that are inputs of blocks."""
        return {*self.blocks.values(), *(self.before.values() if local else ())}

    def target(self, states: Tensor) -> Tensor:
        """The target of a student's states, [..., hidden], from the teacher's states, [..., teacher's hidden]."""
        if self.hidden is not None:
            states = states[..., self.hidden.to(states.device)]
        return states if self.factor is None else states * self.factor.to(states.device, states.dtype)


def corresponding(student: Shape, teacher: Shape, plan: Plan | None, blocks: Sequence[int] | None) -> Correspondence:
    """The correspondence by the plan that the student was cut by; without a plan, blocks are spread evenly.

    Args:
        student: shape of the student.
        teacher: shape of the teacher.
        plan: plan by which the student was cut from the teacher; None = unknown.
        blocks: numbers of the student's blocks that are compared; None = all.

    Raises:
        UserError: the plan is of other models, or hidden sizes differ and there is no plan.
    """
    chosen = list(range(student.layers) if blocks is None else blocks)
    if wrong := [block for block in chosen if not 0 <= block < student.layers]:
        raise UserError(f"distillation.blocks names {wrong[0]}; the model has {student.layers} blocks, counted from 0")
    if plan is None:
        if student.hidden != teacher.hidden:
            raise UserError(
                f"the model has {student.hidden} hidden dimensions, its teacher {teacher.hidden}: name the plan that "
                "it was cut by (distillation.plan), or leave out the objectives mse and cosine"
            )
        ends = [-(-(block + 1) * teacher.layers // student.layers) - 1 for block in range(student.layers)]
        return _between([-1, *ends], chosen)
    if not plan.source.agrees(teacher) or not plan.shape.agrees(student):
        raise UserError(
            f"the plan leads from {plan.source} to {plan.shape}, but the teacher has {teacher} and the model "
            f"{student}: name the plan that the model was cut by (distillation.plan)"
        )
    hidden = None if plan.hidden is None else torch.tensor(plan.hidden)
    factor = plan.factors.get("hidden")
    # A block's states are the inputs of the next block that stays; it also learns the removed blocks between them.
    given = [min(block.attention, block.mlp) for block in plan.blocks] + [teacher.layers]
    return _between([number - 1 for number in given], chosen, hidden, factor)


def _between(
    ends: Sequence[int], chosen: Sequence[int], hidden: Tensor | None = None, factor: Tensor | None = None
) -> Correspondence:
    """The correspondence of a student whose block i begins after the teacher's block ``ends[i]``."""
    after = {block: ends[block + 1] for block in chosen}
    return Correspondence(after, {block: ends[block] for block in chosen}, hidden, factor)
