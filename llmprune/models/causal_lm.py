"""A Hugging Face causal LM as a Composer model."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from composer.core import State
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric
from transformers import PreTrainedModel

from llmprune.models.autocast import forgetting_casts, in_autocast, products_in
from llmprune.models.batch_halving import Halving
from llmprune.models.families import family_of
from llmprune.models.flops import learned_by, step_flops
from llmprune.models.objectives import IGNORED, next_token, next_tokens, predicting
from llmprune.models.vocabulary import Head, head_of, mean_loss, token_measures, without_head

Batch = Mapping[str, Tensor]


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token losses of a batch, float32; only one sample's logits exist in float32 at a time.

    Args:
        logits: logits, [batch, length, vocabulary].
        labels: input ids themselves, int64 [batch, length] (the shift by one happens here); ``IGNORED`` = no loss.

    Returns:
        The sum of negative log-likelihoods (nats) and the number of predicted tokens of every sample, [batch] each.
    """
    targets = next_tokens(labels)
    losses = torch.stack(
        [
            F.cross_entropy(sample.float(), wanted, ignore_index=IGNORED, reduction="none")
            for sample, wanted in zip(logits, targets, strict=True)
        ]
    )
    return losses.sum(1), (targets != IGNORED).sum(1)


def labels_of(batch: Batch) -> Tensor:
    """The labels of a batch, int64 [batch, length]; without labels, its input ids."""
    labels = batch.get("labels")
    return batch["input_ids"] if labels is None else labels


def count_tokens(batch: Batch) -> dict[str, int]:
    """The number of all tokens and of predicted tokens of a batch, in the form of Composer's data specs."""
    samples, length = batch["input_ids"].shape
    labels = batch.get("labels")
    predicted = samples * (length - 1) if labels is None else int((labels[:, 1:] != IGNORED).sum())
    return {"total": samples * length, "loss_generating": predicted}


def logits_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The logits of a batch, [batch, length, vocabulary]; see ``run_model``."""
    return run_model(model, batch)


def run_model(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The logits of a batch by a model's forward pass, [batch, length, vocabulary].

    Attention restarts where ``position_ids`` restart. Flash attention gets the bounds as arguments; for other
    attentions Transformers makes the masks from the positions, with the windows of sliding-window models; a few
    families need a mask.
    """
    tokens, positions = batch["input_ids"], batch.get("position_ids")
    mask: Tensor | None = None
    bounds: dict[str, Any] = {}
    attention = model.config._attn_implementation
    if positions is None:
        if attention == "sdpa" and tokens.device.type != "cpu":
            # Without a mask, Transformers makes one with which a GPU's causal kernels can't be used.
            mask = torch.ones_like(tokens)
    elif attention.startswith("flash"):
        bounds = document_bounds(positions)
    elif family_of(model.config).document_masks:
        mask = document_mask(positions, model.dtype)
    with forgetting_casts(tokens.device.type):
        return model(  # type: ignore[no-any-return]
            input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False, **bounds
        ).logits


def final_states(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Head]:
    """The input of a model's output layer for a batch, [batch · length, hidden], and the output layer."""
    with without_head(model):
        states = run_model(model, batch)
    return states.flatten(0, -2), head_of(model)


def next_token_loss(states: Tensor, head: Head, labels: Tensor) -> Tensor:
    """The mean next-token loss (nats per token) of a batch from its ``final_states`` and labels [batch, length]."""
    chosen = predicting(labels).flatten()
    measure = next_token(next_tokens(labels).flatten()[chosen])
    return mean_loss(states[chosen], head, measure, [1.0])[0]


def document_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """An attention mask in which each token sees only the tokens before it in its document.

    Args:
        positions: positions that restart at every document, int64 [batch, length].
        dtype: dtype of the mask.

    Returns:
        Values to add to the attention scores, [batch, 1, length, length]: 0 if the token is seen, else the least
        number.
    """
    document = (positions == 0).cumsum(1)
    seen = (document[:, :, None] == document[:, None, :]).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def document_bounds(positions: Tensor) -> dict[str, Any]:
    """The bounds of documents as arguments of flash attention (see Transformers' ``FlashAttentionKwargs``).

    Args:
        positions: positions that restart at every document, int64 [batch, length]; each sample starts a new document.
    """
    begins = positions == 0
    begins[:, 0] = True
    bounds = F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel()).int()
    length = positions.shape[1]  # an upper bound; the exact maximum would make the host wait
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": length, "max_length_k": length}


class MeanLoss(Metric):
    """Mean next-token loss (nats per token) over all samples."""

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        """Start with no tokens."""
        super().__init__(**kwargs)
        self.add_state("loss", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, tokens: Tensor, domain: Tensor) -> None:
        """Add a batch: loss sums, token counts and domain numbers, [batch] each."""
        self.loss += loss.double().sum()
        self.tokens += tokens.sum()

    def compute(self) -> Tensor:
        """Nats per token (NaN before the first token)."""
        return self.loss / self.tokens


class DomainLoss(MeanLoss):
    """The mean loss over all samples, and over the samples of each domain.

    Attributes:
        means: mean loss of each domain (nats per token; NaN without tokens), by the domain's number, as of the last
            ``compute``.
    """

    def __init__(self, domains: int, **kwargs: Any) -> None:
        """Measure domains whose numbers are below ``domains``."""
        super().__init__(**kwargs)
        self.means: list[float] = []
        self.add_state("losses", torch.zeros(domains, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(domains, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, tokens: Tensor, domain: Tensor) -> None:
        """Add a batch: loss sums, token counts and domain numbers, [batch] each."""
        super().update(loss, tokens, domain)
        # Sums on the CPU are reproducible, those on GPUs are not; one copy of all three, so that the host waits once.
        place, *parts = torch.stack([domain.double(), loss.double(), tokens.double()]).cpu()
        for total, values in zip((self.losses, self.counts), parts, strict=True):
            sums = torch.zeros(total.shape, dtype=total.dtype).index_add_(0, place.long(), values.to(total.dtype))
            total += sums.to(total.device)

    def compute(self) -> Tensor:
        """Nats per token over all samples."""
        self.means = (self.losses / self.counts).tolist()
        return super().compute()


class PerplexityMetric(MeanLoss):
    """Perplexity: exp of the mean next-token loss."""

    def compute(self) -> Tensor:
        """Perplexity per token."""
        return super().compute().exp()


class Objective(Protocol):
    """A way of training and evaluating a model other than its own next-token loss."""

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch, a mean over the tokens that ``count_tokens`` counts as loss-generating."""

    def final_states(self, batch: Batch) -> tuple[Tensor, Head]:
        """The result of the function ``final_states`` for the model that is trained."""

    def flops(self, batch: Batch) -> int:
        """Floating-point operations of a training step, forward and backward."""


class ComposerCausalLM(ComposerModel):
    """A Composer model that trains and evaluates any Hugging Face causal LM of a supported family.

    Parameter names are Hugging Face's with the prefix ``model.``. A batch contains ``input_ids`` [batch, length],
    optionally ``position_ids`` (see ``run_model``), ``labels`` (default: the input ids) and ``domain`` [batch]
    (default: 0). Loss, perplexity and the losses per domain are all computed in one pass over the logits, of which only
    a part exists at a time.
    """

    def __init__(
        self, model: PreTrainedModel, domains: Mapping[int, str] | None = None, *, products: torch.dtype | None = None
    ) -> None:
        """Wrap ``model``.

        Args:
            model: model to train; ``use_cache`` of its config is switched off.
            domains: names of the domains that are evaluated, by number.
            products: dtype of matrix products, by autocast; None = that of the weights, or Composer's ``precision`` (on
                CPUs Composer supports only fp32).
        """
        super().__init__()
        self.model = model
        self.family = family_of(model.config)
        self.domains = dict(domains or {})
        self.products = products
        self.objective: Objective | None = None  # set by a callback
        self.halving: Halving | None = None  # halves evaluation batches if memory runs out
        self.ungated: Callable[[], AbstractContextManager[None]] | None = None  # while it is open, gates have no effect
        model.config.use_cache = False
        # Composer shards the blocks and checkpoints their activations (checkpointed blocks are in a wrapper).
        model.fsdp_wrap_fn = model.activation_checkpointing_fn = self._is_block  # type: ignore[assignment]

    def _is_block(self, module: nn.Module) -> bool:
        return any(module is block for block in self.model.get_submodule(self.family.blocks).children())

    def forward(self, batch: Batch) -> Tensor:
        """Mean next-token loss of the batch (nats per token), or the objective's."""
        with self._products(batch):
            if self.objective is not None:
                return self.objective.loss(batch)
            return next_token_loss(*final_states(self.model, batch), labels_of(batch))

    def _products(self, batch: Batch) -> AbstractContextManager[None]:
        return products_in(self.products, batch["input_ids"].device.type)

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The loss, which is already the output of the forward pass."""
        return outputs

    def final_states(self, batch: Batch) -> tuple[Tensor, Head]:
        """The result of the function ``final_states``, for the model or for the objective's model."""
        return final_states(self.model, batch) if self.objective is None else self.objective.final_states(batch)

    def logits(self, batch: Batch) -> Tensor:
        """All logits of a batch at once, float32 [batch, length, vocabulary]."""
        with self._products(batch):
            states, head = self.final_states(batch)
            return head.logits(in_autocast(states)).view(*batch["input_ids"].shape, -1)

    def eval_forward(self, batch: Batch, outputs: Any = None) -> dict[str, Tensor]:
        """Loss sums, token counts and domain of every sample, [batch] each."""
        return self._measured(batch) if self.halving is None else self.halving(self._measured, batch)

    def _measured(self, batch: Batch) -> dict[str, Tensor]:
        targets = next_tokens(labels_of(batch))
        with self._products(batch):
            (losses,) = token_measures(*self.final_states(batch), next_token(targets.flatten()))
        tokens, domain = (targets != IGNORED).sum(1), batch.get("domain")
        return {
            "loss": losses.view_as(targets).sum(1),
            "tokens": tokens,
            "domain": torch.zeros_like(tokens) if domain is None else domain,
        }

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        """The evaluation metrics: ``loss``, which includes each domain's loss, and ``perplexity``; none in training."""
        return (
            {} if is_train else {"loss": DomainLoss(max(self.domains, default=0) + 1), "perplexity": PerplexityMetric()}
        )

    def update_metric(self, batch: Batch, outputs: dict[str, Tensor], metric: Metric) -> None:
        """Add one batch to a metric."""
        metric.update(**outputs)

    def flops_per_batch(self, batch: Batch) -> int:
        """Floating-point operations of a training step, forward and backward, for Composer's speed monitor."""
        return self.own_flops(batch) if self.objective is None else self.objective.flops(batch)

    def own_flops(self, batch: Batch) -> int:
        """Floating-point operations of a training step of the model itself, with the gradients of what trains."""
        samples, length = batch["input_ids"].shape
        return samples * step_flops(self.model.config, length, learned_by(self.model))


def composer_model(state: State) -> ComposerCausalLM:
    """The Composer model of a trainer's state, with or without the wrapper of data-parallel training."""
    return cast(
        ComposerCausalLM, state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
    )
