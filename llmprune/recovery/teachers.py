"""What a student learns from: another model, its own ungated self, or predictions kept with the data."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.models.block_hooks import RunBlock, hooked_blocks
from llmprune.models.causal_lm import Batch, run_model
from llmprune.models.flops import macs
from llmprune.models.objectives import Divergence, divergence_from, kl_to_likeliest
from llmprune.models.sharded import reshard
from llmprune.models.vocabulary import head_of, without_head


@dataclass
class States:
    """What a model makes of a batch.

    Attributes:
        final: what its output layer is given, [batch · length, hidden].
        after: block → the residual stream after it, [batch, length, hidden].
    """

    final: Tensor
    after: dict[int, Tensor] = field(default_factory=dict)


def states_of(model: PreTrainedModel, batch: Batch, blocks: Iterable[int]) -> States:
    """Run a model but for its output layer, keeping the states after some blocks."""
    wanted, found = set(blocks), {}

    def visit(number: int, run: RunBlock, states: Tensor) -> Tensor:
        out = run(states)
        if number in wanted:
            found[number] = out
        return out

    with hooked_blocks(model, visit), without_head(model):
        final = run_model(model, batch)
    return States(final.flatten(0, -2), found)


class Teacher(Protocol):
    """What a student learns from: it gives predictions and states."""

    def lesson(self, batch: Batch, chosen: Tensor) -> tuple[Divergence, dict[int, Tensor]]:
        """What it says of a batch.

        Args:
            batch: see ``ComposerCausalLM``.
            chosen: the places of the tokens that count, int64 [chosen] of [batch · length].

        Returns:
            How far from its predictions those of the chosen tokens are, and its states after the blocks that it was
            asked for, each [batch, length, hidden].
        """

    def done(self) -> None:
        """A lesson is over: free what was gathered for it."""

    def flops(self, batch: Batch) -> int:
        """Floating-point operations that it takes."""


class ModelTeacher:
    """A model that does not learn itself."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        blocks: Iterable[int] = (),
        top_k: int | None = None,
        temperature: float = 1.0,
        alone: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        """Prepare.

        Args:
            model: the teacher.
            blocks: after which it gives its states.
            top_k: see ``forward_kl``.
            temperature: see ``forward_kl``.
            alone: opens a context in which the model, otherwise the student, computes as the teacher.
        """
        self.model, self._blocks, self._alone = model, set(blocks), alone
        self._top_k, self._temperature = top_k, temperature

    @torch.no_grad()
    def lesson(self, batch: Batch, chosen: Tensor) -> tuple[Divergence, dict[int, Tensor]]:
        """See ``Teacher``."""
        if self._alone is None:
            found = states_of(self.model, batch, self._blocks)
        else:
            training = self.model.training
            with self._alone():
                found = states_of(self.model.eval(), batch, self._blocks)
            self.model.train(training)
        head = head_of(self.model)
        return divergence_from(found.final[chosen], head, self._top_k, self._temperature), found.after

    def done(self) -> None:
        """See ``Teacher``; what the student itself has gathered it needs."""
        if self._alone is None:
            reshard(self.model)

    def flops(self, batch: Batch) -> int:
        """See ``Teacher``."""
        samples, length = batch["input_ids"].shape
        return samples * macs(self.model.config, length).forward


class KeptPredictions:
    """The teacher's likeliest tokens and their log-probabilities, which come with every batch."""

    def __init__(self, *, top_k: int | None = None, temperature: float = 1.0) -> None:
        """Prepare; see ``forward_kl`` for both."""
        self._top_k, self._temperature = top_k, temperature

    def lesson(self, batch: Batch, chosen: Tensor) -> tuple[Divergence, dict[int, Tensor]]:
        """See ``Teacher``."""
        tokens, logs = (batch[name].flatten(0, 1)[chosen, : self._top_k] for name in ("teacher_tokens", "teacher_logs"))

        def divergence(logits: Tensor, part: slice) -> Tensor:
            return kl_to_likeliest(logits, tokens[part], logs[part], self._temperature)

        return divergence, {}

    def done(self) -> None:
        """See ``Teacher``."""

    def flops(self, batch: Batch) -> int:
        """No operations: the predictions are read."""
        return 0
