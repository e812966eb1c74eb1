"""Which block and which hidden dimensions of a teacher are a student's."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.models.families import Shape
from llmprune.plans.plan import Plan
from llmprune.utils.errors import UserError


@dataclass(frozen=True)
class Correspondence:
    """How a student's states compare with its teacher's.

    Attributes:
        blocks: student's block → the teacher's after which the residual stream should be the same.
        hidden: the teacher's dimensions that the student has, in its order, int64 [hidden]; None = all.
        factor: what they are multiplied by, because the student's weights are, [hidden]; None = nothing.
    """

    blocks: dict[int, int]
    hidden: Tensor | None = None
    factor: Tensor | None = None

    def target(self, states: Tensor) -> Tensor:
        """What a student's states should be, [..., hidden], from the teacher's, [..., teacher's hidden]."""
        if self.hidden is not None:
            states = states[..., self.hidden.to(states.device)]
        return states if self.factor is None else states * self.factor.to(states.device, states.dtype)


def corresponding(student: Shape, teacher: Shape, plan: Plan | None, blocks: Sequence[int] | None) -> Correspondence:
    """How a student compares with its teacher: by the plan that it was cut by, else with blocks spread evenly.

    Args:
        student: its shape.
        teacher: its shape.
        plan: that led from the teacher to the student, if known.
        blocks: of the student that are compared; None = all.

    Raises:
        UserError: the plan is another's, or hidden sizes differ and there is no plan.
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
        return Correspondence({block: -(-(block + 1) * teacher.layers // student.layers) - 1 for block in chosen})
    if plan.source != teacher or plan.shape != student:
        raise UserError(
            f"the plan leads from {plan.source} to {plan.shape}, but the teacher has {teacher} and the model "
            f"{student}: name the plan that the model was cut by (distillation.plan)"
        )
    hidden = None if plan.hidden is None else torch.tensor(plan.hidden)
    factor = plan.factors.get("hidden")
    # A block's states are what the next one that stays is given: of what went in between, it has to make up.
    given = [min(block.attention, block.mlp) for block in plan.blocks] + [teacher.layers]
    return Correspondence({block: given[block + 1] - 1 for block in chosen}, hidden, factor)
