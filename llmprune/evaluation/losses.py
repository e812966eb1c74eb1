"""Held-out losses of a model on prepared data."""

import logging
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from llmprune.data.dataset import EvalDataset
from llmprune.data.prepared import PreparedData
from llmprune.models.causal_lm import labels_of, logits_of, token_losses
from llmprune.models.retold import Spelling
from llmprune.models.source import longest_input
from llmprune.utils.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Losses:
    """Mean next-token losses in nats per token.

    Attributes:
        loss: mean loss over all evaluated tokens.
        domains: mean loss of each domain, by name.
    """

    loss: float
    domains: dict[str, float]


@torch.no_grad()
def evaluate_losses(
    model: PreTrainedModel,
    data: PreparedData,
    *,
    samples_per_domain: int | None = None,
    batch_size: int = 8,
    boundaries: bool | None = None,
    spelling: Spelling | None = None,
) -> Losses:
    """Measure the losses of ``model`` on the evaluation splits of ``data``.

    Args:
        model: causal LM whose tokenizer made the data, or whose vocabulary was cut from that tokenizer's.
        data: prepared data.
        samples_per_domain: largest number of samples per domain; None = all.
        batch_size: number of samples per forward pass.
        boundaries: whether attention restarts at each document; None = only for conversations.
        spelling: how a model with fewer tokens spells the data's; the losses are per token of the data all the same;
            None = the model has the data's vocabulary.
    """
    dataset = EvalDataset(data, samples_per_domain, boundaries=boundaries)
    sums = torch.zeros(len(dataset.domains), dtype=torch.float64)
    counts = torch.zeros(len(dataset.domains), dtype=torch.int64)
    model.eval()
    with Progress(desc="held-out losses", total=len(dataset), unit="samples") as progress:
        for batch in DataLoader(dataset, batch_size=batch_size):
            placed = {name: values.to(model.device) for name, values in batch.items()}
            if spelling is None:
                loss, number = token_losses(logits_of(model, placed), labels_of(placed))
            else:
                told, number = spelling.retold(placed, longest_input(model.config))
                told = spelling.renumbered(told)
                loss, _ = token_losses(logits_of(model, told), told["labels"])
            sums.index_add_(0, batch["domain"], loss.double().cpu())
            counts.index_add_(0, batch["domain"], number.cpu())
            progress.update(len(batch["domain"]))
    domains = {dataset.domains[i]: (sums[i] / counts[i]).item() for i in dataset.domains_present}
    for i, name in zip(dataset.domains_present, domains, strict=True):
        log.info("%s: loss %.4f on %s tokens", name, domains[name], f"{int(counts[i]):,}")
    return Losses(loss=(sums.sum() / counts.sum()).item(), domains=domains)
