"""Training of a replacement module; the blocks before the span run once for the source and the shortened model."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from llmprune.models.block_hooks import RunBlock, blocks_of, hidden_states_in, hooked_blocks
from llmprune.models.causal_lm import Batch, labels_of, run_model
from llmprune.models.families import family_of
from llmprune.models.flops import Macs, learned_by, macs
from llmprune.models.objectives import (
    HIDDEN_OBJECTIVES,
    cosine_distance,
    divergence_from,
    loss_of_predictions,
    mean_over,
    next_tokens,
    places,
    predicting,
    squared_error,
)
from llmprune.models.vocabulary import Head, head_of, without_head
from llmprune.pruning.replacements.modules import ReplacementModule
from llmprune.pruning.replacements.span import Span


@dataclass
class Source:
    """The source model's states for a batch.

    Attributes:
        before: residual stream before the span, [batch, length, hidden].
        after: residual stream after the span, [batch, length, hidden]; None if it was not requested.
        update: contribution to ``before`` of the MLP before the span, [batch, length, hidden]; None if the replacement
            module does not read it.
        final: input of the output layer, [batch · length, hidden]; None if it was not requested.
    """

    before: Tensor = field(default_factory=lambda: torch.empty(0))
    after: Tensor | None = None
    update: Tensor | None = None
    final: Tensor | None = None

    def shape_update(self) -> None:
        """Reshape ``update`` to the shape of ``before``: some architectures flatten tokens for their MLPs."""
        if self.update is not None:
            self.update = self.update.view_as(self.before)


@dataclass
class Shortened:
    """The states of the model with the replacement module for a batch.

    Attributes:
        after: residual stream after the replacement module, [batch, length, hidden].
        final: input of the output layer, [batch · length, hidden]; None if it was not requested.
    """

    after: Tensor = field(default_factory=lambda: torch.empty(0))
    final: Tensor | None = None


class Streaming:
    """The objective of a replacement module (see ``llmprune.models.causal_lm.Objective``).

    The source's weights serve as the teacher and, outside the span, as the shortened model. No gradient reaches the
    blocks before the span, so these run once for both. The blocks after the span run only for objectives that need
    them.

    Attributes:
        terms: values of the objectives on the last batch by name, each a number not multiplied by its weight.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        replacement: ReplacementModule,
        span: Span,
        weights: Mapping[str, float],
        *,
        top_k: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        """Store the models and the objectives' weights.

        Args:
            model: source model.
            replacement: replacement module that learns.
            span: span of the source's blocks that is replaced.
            weights: weights of the objectives, by name.
            top_k: number of likeliest tokens that are compared, see ``forward_kl``.
            temperature: divisor of the logits, see ``forward_kl``.
        """
        self.model, self.replacement, self.span = model, replacement, span
        self._top_k, self._temperature = top_k, temperature
        self._weights = dict(weights)
        self._needs_after = any(name in weights for name in HIDDEN_OBJECTIVES)
        self._needs_final = any(name not in HIDDEN_OBJECTIVES for name in weights)
        self.terms: dict[str, Tensor] = {}

    def forward(self, batch: Batch) -> tuple[Source, Shortened]:
        """Run the source and the shortened model, as far as the objectives need it."""
        source = self.source(batch, after=self._needs_after, final="kl" in self._weights)
        return source, self.shortened(batch, source, final=self._needs_final)

    def loss(self, batch: Batch) -> Tensor:
        """The weighted sum of the objectives, each a mean over the positions that predict a token."""
        source, shortened = self.forward(batch)
        labels = labels_of(batch)
        chosen = predicting(labels)
        terms: dict[str, Tensor] = {}
        for name, measure in (("mse", squared_error), ("cosine", cosine_distance)):
            if name in self._weights:
                assert source.after is not None
                terms[name] = mean_over(measure(shortened.after, source.after), chosen)
        self.terms = {name: value.detach() for name, value in terms.items()}
        total = torch.zeros((), device=chosen.device)
        for name, term in terms.items():
            total = total + self._weights[name] * term
        return total + self._of_predictions(source, shortened, labels, chosen) if self._needs_final else total

    def _of_predictions(self, source: Source, shortened: Shortened, labels: Tensor, chosen: Tensor) -> Tensor:
        """The part of the loss from the objectives of predictions (lm and kl)."""
        head, rows = head_of(self.model), places(chosen)
        assert shortened.final is not None
        divergence = None
        if source.final is not None:
            divergence = divergence_from(source.final[rows], head, self._top_k, self._temperature)
        targets = next_tokens(labels).flatten()[rows]
        loss, terms = loss_of_predictions(shortened.final[rows], head, targets, divergence, self._weights)
        self.terms |= terms
        return loss

    def final_states(self, batch: Batch) -> tuple[Tensor, Head]:
        """The final states of the shortened model, in one pass, and the output layer."""
        found = self.shortened(batch, None, final=True).final
        assert found is not None
        return found, head_of(self.model)

    def flops(self, batch: Batch) -> int:
        """The floating-point operations of a training step, see ``replacement_flops``."""
        samples, length = batch["input_ids"].shape
        return samples * replacement_flops(
            self.model.config,
            self.span,
            self.replacement,
            self._weights,
            length,
            also=learned_by(self.model).own,
            cached="before" in batch,
        )

    @torch.no_grad()
    def source(self, batch: Batch, *, after: bool, final: bool) -> Source:
        """Run the source model as far as needed.

        Args:
            batch: batch of samples, see ``ComposerCausalLM``.
            after: whether the states after the span are needed.
            final: whether the inputs of the output layer are needed.
        """
        if "before" in batch:  # from a cache
            return Source(*(batch[end].to(self.model.dtype) for end in ("before", "after")))
        found, span, layers = Source(), self.span, len(blocks_of(self.model))
        last = layers if final else span.end if after else span.start

        def visit(number: int, run: RunBlock, states: Tensor) -> Tensor:
            if number == span.start:
                found.before = states
                found.shape_update()
            out = run(states) if number < last else states
            if number == span.end - 1:
                found.after = out if after else None
            return out if final or number < layers - 1 else _least(out)

        with hooked_blocks(self.model, visit, self.replacement), self._reading_update(found), without_head(self.model):
            out = run_model(self.model, batch)
        found.final = out.flatten(0, -2) if final else None
        return found

    def shortened(self, batch: Batch, source: Source | None, *, final: bool) -> Shortened:
        """Run the model with the replacement module.

        Args:
            batch: batch of samples, see ``ComposerCausalLM``.
            source: states of the source for the same batch; None = run the blocks before the span as well.
            final: whether to continue after the replacement module.
        """
        found, span, own, layers = Shortened(), self.span, source or Source(), len(blocks_of(self.model))

        def visit(number: int, run: RunBlock, states: Tensor) -> Tensor:
            if number < span.start:
                return states if source is not None else run(states)
            if number == span.start and source is not None:
                states = source.before
            if number == span.start:
                own.before = states
                own.shape_update()
            if number in span:
                states = self.replacement.step(number - span.start, run, states, own.update)
            elif final:
                states = run(states)
            if number == span.end - 1:
                found.after = states
            return states if final or number < layers - 1 else _least(states)

        reading = nullcontext() if source is not None else self._reading_update(own)
        with hooked_blocks(self.model, visit, self.replacement), reading, without_head(self.model):
            out = run_model(self.model, batch)
        found.final = out.flatten(0, -2) if final else None
        return found

    @contextmanager
    def _reading_update(self, found: Source) -> Iterator[None]:
        """While open, the output of the MLP before the span is stored in ``found``, if the module reads it."""
        if not self.replacement.reads_update:
            yield
            return
        family = family_of(self.model.config)
        mlp = blocks_of(self.model)[self.span.start - 1].get_submodule(family.update("mlp"))

        def note(module: Any, inputs: Any, output: Any) -> None:
            found.update = hidden_states_in(output)

        handle = mlp.register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()


def replacement_flops(
    config: PretrainedConfig,
    span: Span,
    replacement: ReplacementModule,
    objectives: Collection[str],
    length: int,
    *,
    also: int = 0,
    cached: bool = False,
) -> int:
    """Floating-point operations of a training step on one sample, forward and backward.

    Args:
        config: config of the source model.
        span: span of the source's blocks that is replaced.
        replacement: replacement module that learns.
        objectives: names of the objectives with a weight.
        length: number of tokens in the sample.
        also: multiply-accumulate operations of one token with those of the source's weights that learn.
        cached: whether the states at both ends of the span come from a cache.
    """
    layers = family_of(config).shape(config).layers
    cost = _macs_of(replacement, config, length).step + 2 * length * also
    if not cached:
        cost += macs(config, length, blocks=span.start, logits=0).forward
        if {"kl", *HIDDEN_OBJECTIVES} & set(objectives):
            cost += macs(config, length, blocks=span.length, logits=0).forward
    if set(objectives) - set(HIDDEN_OBJECTIVES):
        after = macs(config, length, blocks=layers - span.end)
        cost += after.forward + after.backward + (after.forward if "kl" in objectives else 0)
    return cost


def _macs_of(replacement: ReplacementModule, config: PretrainedConfig, length: int) -> Macs:
    if replacement.offsets:
        return macs(config, length, blocks=len(replacement.offsets), logits=0)
    return Macs(0, 0, length * sum(p.numel() for p in replacement.parameters() if p.ndim > 1), 0)


def _least(states: Tensor) -> Tensor:
    """The smallest input of the output layer, used if its result is not needed."""
    return states[:1, :1]
