"""The calibration loss of pruned models, computed by the whole model with gates."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from llmprune.models.causal_lm import Batch, labels_of, logits_of, token_losses
from llmprune.models.families import OUTPUTS, family_of
from llmprune.models.retold import Spelling
from llmprune.models.source import longest_input
from llmprune.plans.plan import Plan
from llmprune.plans.surgery import Surgery
from llmprune.pruning.gates.attach import attach
from llmprune.pruning.gates.from_plan import factors_of, mask_experts
from llmprune.pruning.selection.methods import ScoredModel
from llmprune.utils.files import sha256_text


def plan_hash(plan: Plan) -> str:
    """Hash of what a plan keeps, multiplies and corrects; plans with the same result have the same hash."""
    tensors = {**plan.factors, **plan.corrections}
    sums = sorted((name, tensor.double().sum().item()) for name, tensor in tensors.items())
    return sha256_text(f"{plan.blocks} {plan.hidden} {plan.vocabulary} {plan.skipped} {sums}")


class Trial:
    """A model that computes like the pruned models of plans, one after the other.

    Attributes:
        scored: model in memory; between trials it computes as before.
    """

    def __init__(self, scored: ScoredModel) -> None:
        """Attach gates to the model."""
        self.scored = scored
        self._known: dict[str, float] = {}  # losses on the calibration samples
        self._spelling: Spelling | None = None  # with the last plan's tokens
        family = family_of(scored.model.config)
        self._slot = attach(scored.model, family, {"hidden", "attention", "mlp", "query", "channel"})
        self._whole = self._slot.factors

    def loss(self, plan: Plan, samples: Tensor | Batch | None = None) -> float:
        """The mean loss per token, in nats, of a plan's model; that of equal plans is computed once.

        The samples are retold with the tokens that a plan keeps. The tokens of the loss are the source's all the same,
        so that plans with different vocabularies can be compared.

        Args:
            plan: plan, which may have corrections.
            samples: tokens, int64 [samples, length], or a batch that has labels or positions too; None = the
                calibration samples.
        """
        if samples is None:
            samples, key = self.scored.tokens, "" if plan.corrections else plan_hash(plan)
            if key in self._known:
                return self._known[key]
        else:
            key = ""
        loss = self._computed(plan, {"input_ids": samples} if isinstance(samples, Tensor) else samples)
        if key:
            self._known[key] = loss
        return loss

    @torch.no_grad()
    def _computed(self, plan: Plan, samples: Batch) -> float:
        model, device = self.scored.model, self.scored.model.device
        factors = factors_of(plan)
        on_device = {name: value.to(device) for name, value in factors.trainable().items()}
        kept = {name: value.to(device) for name, value in factors.kept.items()}
        self._slot.factors = replace(factors, **on_device, kept=kept)  # type: ignore[arg-type]
        hooks = mask_experts(model, plan)
        try:
            batch = {name: values.to(device) for name, values in samples.items()}
            with self._corrected(plan):
                return self._mean_loss(batch) if plan.vocabulary is None else self._retold_loss(batch, plan.vocabulary)
        finally:
            self._slot.factors = self._whole
            for hook in hooks:
                hook.remove()

    def _mean_loss(self, samples: Batch) -> float:
        total, count, size = 0.0, 0, self.scored.batch_size
        for first in range(0, len(samples["input_ids"]), size):
            part = {name: values[first : first + size] for name, values in samples.items()}
            losses, counts = token_losses(logits_of(self.scored.model, part), labels_of(part))
            total, count = total + losses.double().sum().item(), count + int(counts.sum())
        return total / count

    def _retold_loss(self, samples: Batch, kept: tuple[int, ...]) -> float:
        """The loss with some tokens only, divided by the number of the samples' own tokens."""
        assert self.scored.tokenizer is not None
        config, size = self.scored.model.config, self.scored.batch_size
        absent = torch.full((config.vocab_size,), -torch.inf, device=samples["input_ids"].device)
        absent[list(kept)] = 0
        if self._spelling is None or self._spelling.kept != kept:
            self._spelling = Spelling.of(self.scored.tokenizer, kept)
        total, count = 0.0, 0
        for first in range(0, len(samples["input_ids"]), size):
            part = {name: values[first : first + size] for name, values in samples.items()}
            batch, told = self._spelling.retold(part, longest_input(config))
            count += int(told.sum())
            losses, _ = token_losses(logits_of(self.scored.model, batch).add_(absent), batch["labels"])
            total += losses.double().sum().item()
        return total / count

    @contextmanager
    def _corrected(self, plan: Plan) -> Iterator[None]:
        """While open, output matrices and their biases have the plan's corrections."""
        before: dict[str, Tensor] = {}
        if plan.corrections:
            surgery = Surgery(self.scored.model.config, plan)
            weights = dict(self.scored.model.named_parameters())
            corrected = {
                name: surgery.whole(name, weights)
                for name in weights
                if surgery.family.locate(name).role in OUTPUTS and surgery.new_name(name) is not None
            }
            for name, tensor in corrected.items():
                before[name], weights[name].data = weights[name].data, tensor
        try:
            yield
        finally:
            for name, tensor in before.items():
                weights[name].data = tensor
