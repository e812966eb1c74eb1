"""Learning from a teacher, as the objective of a model (Minitron, arXiv:2407.14679, section 3)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmprune.models.causal_lm import Batch, ComposerCausalLM, final_states, labels_of
from llmprune.models.objectives import (
    cosine_distance,
    mean_over,
    next_token,
    next_tokens,
    places,
    predicting,
    relative_error,
)
from llmprune.models.vocabulary import Head, head_of, mean_loss
from llmprune.recovery.correspondence import Correspondence
from llmprune.recovery.teachers import Teacher, states_of

_OF_STATES = {"mse": relative_error, "cosine": cosine_distance}


class Distilling:
    """The objective (see ``llmprune.models.causal_lm.Objective``).

    Attributes:
        weights: of the objectives kl, lm, mse and cosine.
        terms: the objectives of the last batch, each a number without its weight.
    """

    def __init__(
        self,
        student: ComposerCausalLM,
        teacher: Teacher,
        weights: Mapping[str, float],
        correspondence: Correspondence | None = None,
    ) -> None:
        """Prepare.

        Args:
            student: learns.
            teacher: what from.
            weights: of the objectives.
            correspondence: of states, if they are compared.
        """
        self._student, self._teacher, self._correspondence = student, teacher, correspondence
        self.weights = dict(weights)
        self.terms: dict[str, Tensor] = {}

    def loss(self, batch: Batch) -> Tensor:
        """The weighted sum of the objectives, each a mean over the positions that predict a token."""
        labels = labels_of(batch)
        chosen = predicting(labels)
        rows = places(chosen)
        divergence, targets = self._teacher.lesson(batch, rows)
        pairs = {} if self._correspondence is None else self._correspondence.blocks
        found = states_of(self._student.model, batch, pairs)
        following = next_token(next_tokens(labels).flatten()[rows])
        names = [name for name in ("kl", "lm") if name in self.weights]

        def measure(logits: Tensor, part: slice) -> list[Tensor]:
            kl = [divergence(logits, part)] if "kl" in self.weights else []
            return [*kl, *(following(logits, part) if "lm" in self.weights else [])]

        loss, self.terms = found.final.sum() * 0.0, {}
        if names:
            states, weights = found.final[rows], [self.weights[name] for name in names]
            loss, means = mean_loss(states, head_of(self._student.model), measure, weights)
            self.terms = dict(zip(names, means, strict=True))
        self._teacher.done()
        for name in self.weights:
            if name in _OF_STATES:
                assert self._correspondence is not None
                wanted = {own: self._correspondence.target(targets[other]) for own, other in pairs.items()}
                each = [mean_over(_OF_STATES[name](found.after[own], target), chosen) for own, target in wanted.items()]
                part = torch.stack(each).mean()
                self.terms[name] = part.detach()
                loss = loss + self.weights[name] * part
        return loss

    def final_states(self, batch: Batch) -> tuple[Tensor, Head]:
        """The student's."""
        return final_states(self._student.model, batch)

    def flops(self, batch: Batch) -> int:
        """Operations of the student's step and of the teacher."""
        return self._student.own_flops(batch) + self._teacher.flops(batch)
