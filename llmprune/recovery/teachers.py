"""Teachers of a student: another model, the same model without gates, or predictions stored with the data."""

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
from llmprune.recovery.token_map import TokenMap


@dataclass
class States:
    """The hidden states of a model for a batch.

    Attributes:
        final: input of the output layer, [batch · length, hidden].
        after: residual stream after a block, by the number of the block, [batch, length, hidden]; -1 = the embeddings.
    """

    final: Tensor
    after: dict[int, Tensor] = field(default_factory=dict)


def states_of(model: PreTrainedModel, batch: Batch, blocks: Iterable[int]) -> States:
    """Run a model without its output layer, and keep the hidden states after the given blocks (-1: embeddings)."""
    wanted, found = set(blocks), {}

    def visit(number: int, run: RunBlock, states: Tensor) -> Tensor:
        if number == 0 and -1 in wanted:
            found[-1] = states
        out = run(states)
        if number in wanted:
            found[number] = out
        return out

    with hooked_blocks(model, visit), without_head(model):
        final = run_model(model, batch)
    return States(final.flatten(0, -2), found)


class Teacher(Protocol):
    """A teacher of a student: the source of predictions and hidden states."""

    def lesson(self, batch: Batch, chosen: Tensor) -> tuple[Divergence, dict[int, Tensor]]:
        """The teacher's predictions and hidden states for a batch.

        Args:
            batch: batch of samples, see ``ComposerCausalLM``.
            chosen: places of the tokens that count, int64 [chosen], as indices into [batch · length].

        Returns:
            The divergence of the chosen tokens' predictions from the teacher's, as a function, and the teacher's hidden
            states after its given blocks, each [batch, length, hidden].
        """

    def done(self) -> None:
        """Free the parameters that were gathered for a lesson."""

    def left_out(self) -> Tensor | None:
        """The mean probability that the last lesson's predictions gave to tokens that the student can't write.

        A scalar; None = both have the same vocabulary.
        """

    def flops(self, batch: Batch) -> int:
        """The floating-point operations of the teacher for a batch."""


class ModelTeacher:
    """A model as teacher; it does not learn itself."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        blocks: Iterable[int] = (),
        top_k: int | None = None,
        temperature: float = 1.0,
        alone: Callable[[], AbstractContextManager[None]] | None = None,
        tokens: TokenMap | None = None,
    ) -> None:
        """Store the model and the settings.

        Args:
            model: model that teaches.
            blocks: numbers of the blocks after which hidden states are returned; -1 = the embeddings.
            top_k: number of likeliest tokens that are compared, see ``forward_kl``.
            temperature: divisor of the logits, see ``forward_kl``.
            alone: function that opens a context in which the model, otherwise the student, computes as the teacher.
            tokens: how the model reads the student's tokens; None = both have the same vocabulary.
        """
        self._tokens = None if tokens is None else tokens.to(model.device)  # once: a copy makes a GPU's host wait
        self._left_out: list[Tensor] = []
        self.model, self._blocks, self._alone = model, set(blocks), alone
        self._top_k, self._temperature = top_k, temperature

    @torch.no_grad()
    def lesson(self, batch: Batch, chosen: Tensor) -> tuple[Divergence, dict[int, Tensor]]:
        """See ``Teacher``."""
        tokens = self._tokens
        if tokens is not None:
            batch = {**batch, "input_ids": tokens.teachers[batch["input_ids"]]}
        if self._alone is None:
            found = states_of(self.model, batch, self._blocks)
        else:
            training = self.model.training
            with self._alone():
                found = states_of(self.model.eval(), batch, self._blocks)
            self.model.train(training)
        settings = (self._top_k, self._temperature)
        if tokens is None:
            return divergence_from(found.final[chosen], head_of(self.model), *settings), found.after

        self._left_out = []

        def translated(logits: Tensor) -> Tensor:
            shared, rest = tokens.predictions(logits, self._temperature)
            self._left_out.append(rest)
            return shared

        return divergence_from(found.final[chosen], head_of(self.model), *settings, translated), found.after

    def left_out(self) -> Tensor | None:
        """See ``Teacher``."""
        if self._tokens is None:
            return None
        return (
            torch.cat(self._left_out).mean()
            if self._left_out
            else self._tokens.students.new_zeros((), dtype=torch.float)
        )

    def done(self) -> None:
        """See ``Teacher``; gathered parameters that the student needs itself are not freed."""
        if self._alone is None:
            reshard(self.model)

    def flops(self, batch: Batch) -> int:
        """See ``Teacher``."""
        samples, length = batch["input_ids"].shape
        return samples * macs(self.model.config, length).forward


class KeptPredictions:
    """The teacher's likeliest tokens and their log-probabilities, which are part of every batch."""

    def __init__(self, *, top_k: int | None = None, temperature: float = 1.0) -> None:
        """Store both settings; see ``forward_kl``."""
        self._top_k, self._temperature = top_k, temperature

    def lesson(self, batch: Batch, chosen: Tensor) -> tuple[Divergence, dict[int, Tensor]]:
        """See ``Teacher``."""
        tokens, logs = (batch[name].flatten(0, 1)[chosen, : self._top_k] for name in ("teacher_tokens", "teacher_logs"))

        def divergence(logits: Tensor, part: slice) -> Tensor:
            return kl_to_likeliest(logits, tokens[part], logs[part], self._temperature)

        return divergence, {}

    def done(self) -> None:
        """See ``Teacher``."""

    def left_out(self) -> Tensor | None:
        """None: predictions of the model's own tokens are kept."""
        return None

    def flops(self, batch: Batch) -> int:
        """No operations: the predictions are read."""
        return 0
