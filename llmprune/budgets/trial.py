"""The calibration loss of what a plan leaves of a model, without cutting it."""

from dataclasses import replace

import torch

from llmprune.families import family_of
from llmprune.gates.attach import attach
from llmprune.gates.from_plan import factors_of, mask_experts
from llmprune.models.causal_lm import token_losses
from llmprune.plans import Plan
from llmprune.scoring.selection import Opened


class Trial:
    """A model that computes what plans leave of it, one after the other.

    Attributes:
        opened: the model; between trials it computes as before.
    """

    def __init__(self, opened: Opened) -> None:
        """Let the model compute with gates."""
        self.opened = opened
        family = family_of(opened.model.config)
        self._slot = attach(opened.model, family, {"hidden", "attention", "mlp", "query", "channel"})
        self._whole = self._slot.factors

    @torch.no_grad()
    def loss(self, plan: Plan) -> float:
        """The mean loss per token in nats on the calibration samples."""
        model, tokens = self.opened.model, self.opened.tokens
        factors = factors_of(plan)
        on_device = {name: value.to(tokens.device) for name, value in factors.trainable().items()}
        kept = {name: value.to(tokens.device) for name, value in factors.kept.items()}
        self._slot.factors = replace(factors, **on_device, kept=kept)  # type: ignore[arg-type]
        hooks = mask_experts(model, plan)
        try:
            total, count = 0.0, 0
            for part in tokens.split(self.opened.batch_size):
                losses, counts = token_losses(model(input_ids=part, use_cache=False).logits, part)
                total, count = total + losses.double().sum().item(), count + int(counts.sum())
        finally:
            self._slot.factors = self._whole
            for hook in hooks:
                hook.remove()
        return total / count
