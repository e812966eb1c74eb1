"""Losses over the vocabulary, computed for some tokens at a time, so that a batch's logits never all exist together."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from llmprune.models.autocast import in_autocast
from llmprune.models.families import family_of

# Number of logits at a time: few enough for a CPU's caches, enough to keep a GPU busy (256 MB in float32).
CHUNKS = {"cpu": 2**20, "cuda": 2**26}
LEAST = 128  # fewest tokens at a time, as each chunk reads the whole weight

Measure = Callable[[Tensor, slice], Sequence[Tensor]]
"""Losses of some tokens, [tokens] each, from their logits, float32 [tokens, vocabulary]; the slice says which."""


@dataclass(frozen=True)
class Head:
    """The output layer of a model.

    Attributes:
        weight: weight of the layer, [vocabulary, hidden].
        bias: bias of the layer, [vocabulary]; None = no bias.
        softcap: bound of the logits: x becomes softcap · tanh(x / softcap); None = no bound.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def raw(self, states: Tensor) -> Tensor:
        """The layer's matrix product with its bias, [tokens, vocabulary] from [tokens, hidden]."""
        return F.linear(states, self.weight.to(states.dtype), None if self.bias is None else self.bias.to(states.dtype))

    def capped(self, raw: Tensor) -> Tensor:
        """The logits from the matrix product, float32 [tokens, vocabulary]."""
        logits = raw.float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logits(self, states: Tensor) -> Tensor:
        """The logits from the output layer's inputs, float32 [tokens, vocabulary] from [tokens, hidden]."""
        return self.capped(self.raw(states))

    def cast(self, dtype: torch.dtype) -> "Head":
        """A copy of the layer with its weight in another dtype, for use with many chunks."""
        return replace(self, weight=self.weight.to(dtype))

    def chunks(self, tokens: int) -> list[slice]:
        """Slices of ``tokens`` tokens; the logits of one slice may exist at a time."""
        size = max(CHUNKS[self.weight.device.type] // self.weight.shape[0], LEAST)
        return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


@contextmanager
def without_head(model: PreTrainedModel) -> Iterator[None]:
    """While open, ``model`` returns the inputs of its output layer in place of logits.

    The states are the output of the forward pass, so that a sharded model receives their gradient in the backward pass.
    """
    layer, field = model.get_output_embeddings(), family_of(model.config).softcap
    softcap = None if field is None else getattr(model.config, field)
    layer.forward = _identity
    if field is not None:
        setattr(model.config, field, None)
    try:
        yield
    finally:
        del layer.forward
        if field is not None:
            setattr(model.config, field, softcap)


def _identity(states: Tensor) -> Tensor:
    return states


def head_of(model: PreTrainedModel) -> Head:
    """A model's output layer."""
    layer, field = model.get_output_embeddings(), family_of(model.config).softcap
    return Head(layer.weight, layer.bias, None if field is None else getattr(model.config, field))  # type: ignore[arg-type]


@torch.no_grad()
def token_measures(states: Tensor, head: Head, measure: Measure) -> list[Tensor]:
    """Losses of every token, without gradients.

    Args:
        states: inputs of the output layer, [tokens, hidden], at least one token.
        head: output layer.
        measure: function from logits to losses.

    Returns:
        Each loss, float32 [tokens].
    """
    states = in_autocast(states)
    head = head.cast(states.dtype)
    parts = [measure(head.logits(states[part]), part) for part in head.chunks(len(states))]
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def mean_loss(states: Tensor, head: Head, measure: Measure, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The weighted sum of losses, each averaged over tokens.

    Gradients are computed together with the losses, so that a chunk's logits are computed once and then freed; the
    backward pass only multiplies these gradients. Only one backward pass is possible.

    Args:
        states: inputs of the output layer, [tokens, hidden].
        head: output layer.
        measure: function from logits to losses, as many as there are weights.
        weights: weights of the losses, [losses].

    Returns:
        The weighted sum, a scalar, and each mean without its weight and without gradients, [losses]. Without tokens
        both are 0.
    """
    if not len(states):
        return states.sum() * 0.0, torch.zeros(len(weights), device=states.device)
    if not torch.is_grad_enabled():
        means = torch.stack([values.mean() for values in token_measures(states, head, measure)])
        return (means * torch.tensor(weights, device=means.device)).sum(), means  # autocast would round a product
    total, means = _MeanLoss.apply(in_autocast(states), head.weight, head.bias, head.softcap, measure, tuple(weights))
    return total, means


class _MeanLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        measure: Measure,
        weights: tuple[float, ...],
    ) -> tuple[Tensor, Tensor]:
        head = Head(weight.to(states.dtype), bias, softcap)
        count = len(states)
        needed = ctx.needs_input_grad
        of_states = torch.empty_like(states) if needed[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
        of_bias = torch.zeros_like(bias) if bias is not None and needed[2] else None
        sums = torch.zeros(len(weights), device=states.device)
        coefficients = torch.tensor(weights, device=states.device)
        with torch.autocast(states.device.type, enabled=False):
            for part in head.chunks(count):
                with torch.enable_grad():
                    raw = head.raw(states[part]).detach().requires_grad_(any(needed[:3]))
                    losses = torch.stack([loss.sum() for loss in measure(head.capped(raw), part)])
                    weighted = (losses * coefficients).sum() / count
                sums += losses.detach()
                if not any(needed[:3]):
                    continue
                (grad,) = torch.autograd.grad(weighted, raw)
                del raw, losses, weighted
                if of_states is not None:
                    of_states[part] = grad @ head.weight
                if of_weight is not None:
                    if of_weight.dtype == grad.dtype:
                        of_weight.addmm_(grad.t(), states[part])
                    else:
                        of_weight += grad.t() @ states[part]
                if of_bias is not None:
                    of_bias += grad.sum(0)
        ctx.gradients = (of_states, None if of_weight is None else of_weight.to(weight.dtype), of_bias)
        means = sums / count
        ctx.mark_non_differentiable(means)
        return (means * coefficients).sum(), means

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found, ctx.gradients = ctx.gradients, None  # frees them: no second copy of the weight's gradient
        if found is None:
            raise RuntimeError("the loss over the vocabulary takes one backward pass only")
        return *(None if grad is None else grad.mul_(grads[0]) for grad in found), None, None, None
