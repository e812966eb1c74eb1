"""Distillation: its settings, and the objective of learning from a teacher (Minitron, arXiv:2407.14679)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from composer.utils import dist
from torch import Tensor

from llmprune.models.block_hooks import RunBlock, hooked_blocks
from llmprune.models.causal_lm import Batch, ComposerCausalLM, final_states, labels_of, run_model
from llmprune.models.objectives import (
    HIDDEN_OBJECTIVES,
    LOCAL,
    OBJECTIVES,
    Divergence,
    cosine_distance,
    loss_of_predictions,
    mean_over,
    next_tokens,
    places,
    predicting,
    relative_error,
)
from llmprune.models.sharded import mesh_of
from llmprune.models.vocabulary import Head, head_of, without_head
from llmprune.recovery.correspondence import Correspondence
from llmprune.recovery.teachers import Teacher, states_of
from llmprune.utils.errors import UserError, nearest
from llmprune.utils.formats import TeacherFormat
from llmprune.utils.settings import check_settings, limited


@dataclass
class DistillationConfig:
    """A teacher, usually the model before pruning, whose predictions and hidden states the model learns.

    Attributes:
        teacher: Hugging Face folder or hub name of a model with the same tokenizer, or of the model from whose
            vocabulary this model's was cut; null = while gates train, the same model with open gates; otherwise the
            predictions stored with the data (``python -m data_prep teach``).
        objectives: weights of the losses that are minimised: kl (forward, of predictions), lm (next-token loss), mse
            and cosine (of the hidden states after blocks; mse as a share of the teacher's mean square), local (mse of
            every block by itself, given the teacher's states before it); empty = kl.
        final_objectives: weights of the losses at the end of the run, reached linearly; empty = the same as
            ``objectives``.
        temperature: divisor of the logits of both models.
        top_k: number of the teacher's likeliest tokens that are compared; null = all, or as many as were stored.
        plan: path of the plan that the model was cut by; it determines which tokens, blocks and hidden dimensions are
            compared; null = the plan in the model's folder, if there is one.
        blocks: numbers of the model's blocks whose hidden states are compared; null = all.
        dtype: number format of the teacher's weights: bfloat16 or float32; auto = bfloat16 on GPUs and on processors
            that support it.
    """

    teacher: str | None = None
    objectives: dict[str, float] = limited(make=dict, least=0)
    final_objectives: dict[str, float] = limited(make=dict, least=0)
    temperature: float = limited(1.0, above=0)
    top_k: int | None = limited(None, least=1)
    plan: str | None = None
    blocks: list[int] | None = None
    dtype: TeacherFormat = "auto"

    def check(self) -> None:
        """Raise ``UserError`` for settings that are wrong for any models."""
        check_settings(self, "distillation")
        for key, objectives in (("objectives", self.objectives), ("final_objectives", self.final_objectives)):
            for name in objectives:
                if name not in (known := (*OBJECTIVES, LOCAL)):
                    raise UserError(f"distillation.{key}: there is no objective '{name}'; {nearest(name, known)}")
            if objectives and not any(objectives.values()):
                raise UserError(f"distillation.{key} need a positive weight: write {{kl: 1.0}}")
        if "kl" not in self.names and (self.top_k is not None or self.temperature != 1):
            raise UserError("distillation.temperature and top_k belong to the objective kl")
        if self.blocks is not None and not self.compares_states:
            raise UserError("distillation.blocks belongs to the objectives mse, cosine and local")
        if not self.names - {"lm"}:
            raise UserError("distillation.objectives has lm alone, which needs no teacher: leave the section out")

    @property
    def names(self) -> set[str]:
        """The names of the objectives with a weight at any time of the run."""
        return {name for part in (self.first, self.last) for name, weight in part.items() if weight}

    @property
    def first(self) -> Mapping[str, float]:
        """The weights of the objectives at the start of the run."""
        return self.objectives or {"kl": 1.0}

    @property
    def last(self) -> Mapping[str, float]:
        """The weights of the objectives at the end of the run."""
        return self.final_objectives or self.first

    @property
    def compares_states(self) -> bool:
        """Whether hidden states after blocks are compared."""
        return bool(self.names & {*HIDDEN_OBJECTIVES, LOCAL})

    def weights(self, progress: float) -> dict[str, float]:
        """The weights of all objectives after a share of the run, 0 to 1."""
        return {
            name: (1 - progress) * self.first.get(name, 0.0) + progress * self.last.get(name, 0.0)
            for name in sorted(self.names)
        }


_OF_STATES = {"mse": relative_error, "cosine": cosine_distance}


class Distilling:
    """The objective of distillation (see ``llmprune.models.causal_lm.Objective``).

    Attributes:
        weights: weights of the objectives kl, lm, mse, cosine and local, by name.
        terms: values of the objectives on the last batch by name, each a number not multiplied by its weight; and
            ``left_out``, the probability that the teacher gave to tokens that the student can't write, if there are
            such tokens.
    """

    def __init__(
        self,
        student: ComposerCausalLM,
        teacher: Teacher,
        weights: Mapping[str, float],
        correspondence: Correspondence | None = None,
    ) -> None:
        """Store the student, the teacher and the weights.

        Args:
            student: model that learns.
            teacher: source of the predictions and states to learn.
            weights: weights of the objectives, by name.
            correspondence: correspondence of the hidden states, if they are compared; None = they are not.
        """
        self._student, self._teacher, self._correspondence = student, teacher, correspondence
        self.weights = dict(weights)
        self.terms: dict[str, Tensor] = {}

    def loss(self, batch: Batch) -> Tensor:
        """The weighted sum of the objectives, each a mean over the positions that predict a token."""
        labels = labels_of(batch)
        chosen = predicting(labels)
        rows = places(chosen)  # once: on a GPU the host waits for it
        divergence, teachers = self._teacher.lesson(batch, rows)
        self.terms = {}
        # An objective whose weight is 0 for the moment counts too: parameters without a gradient would begin later with
        # their optimizer's moments, and data-parallel training, which gives each a gradient, would differ.
        parts = []
        if LOCAL in self.weights:
            parts.append(self._alone(batch, teachers, chosen))
        if self.weights.keys() - {LOCAL}:
            parts.append(self._together(batch, teachers, chosen, rows, divergence))
        self._teacher.done()
        if (left_out := self._teacher.left_out()) is not None:
            self.terms["left_out"] = left_out
        return torch.stack(parts).sum()

    def _together(
        self, batch: Batch, teachers: Mapping[int, Tensor], chosen: Tensor, rows: Tensor, divergence: Divergence
    ) -> Tensor:
        """The weighted sum of the objectives of a pass through the whole student."""
        pairs = {} if self._correspondence is None else self._correspondence.blocks
        targets = next_tokens(labels_of(batch)).flatten()
        found = states_of(self._student.model, batch, pairs)
        head = head_of(self._student.model)
        loss, terms = loss_of_predictions(found.final[rows], head, targets[rows], divergence, self.weights)
        self.terms |= terms
        for name in self.weights:
            if name in _OF_STATES:
                assert self._correspondence is not None
                wanted = {own: self._correspondence.target(teachers[other]) for own, other in pairs.items()}
                each = [mean_over(_OF_STATES[name](found.after[own], target), chosen) for own, target in wanted.items()]
                part = torch.stack(each).mean()
                self.terms[name] = part.detach()
                loss = loss + self.weights[name] * part
        return loss

    def _alone(self, batch: Batch, teachers: Mapping[int, Tensor], chosen: Tensor) -> Tensor:
        """The weighted mean error of blocks that each get the teacher's states before it."""
        assert self._correspondence is not None
        pairs, model, errors = self._correspondence, self._student.model, []

        def visit(number: int, run: RunBlock, states: Tensor) -> Tensor:
            if number not in pairs.blocks:
                return states
            after = run(pairs.target(teachers[pairs.before[number]]).to(states.dtype))
            target = pairs.target(teachers[pairs.blocks[number]])
            errors.append(mean_over(relative_error(after, target), chosen))
            return after.detach()

        with hooked_blocks(model, visit), without_head(model):
            run_model(model, batch)
        loss = torch.stack(errors).mean()
        self.terms[LOCAL] = loss.detach()
        if dist.get_world_size() > 1 and mesh_of(model.parameters()) is None:
            # Data-parallel training expects a gradient of every parameter, also of those outside these blocks.
            loss = loss + sum(one.flatten()[:1].sum() * 0 for one in model.parameters() if one.requires_grad)
        return self.weights[LOCAL] * loss

    def final_states(self, batch: Batch) -> tuple[Tensor, Head]:
        """The student's final hidden states and its output layer."""
        return final_states(self._student.model, batch)

    def flops(self, batch: Batch) -> int:
        """The floating-point operations of the student's step and of the teacher."""
        return self._student.own_flops(batch) + self._teacher.flops(batch)
