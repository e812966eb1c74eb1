"""Losses between a model and the one that it comes from, token by token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.models.causal_lm import IGNORED


def predicting(labels: Tensor) -> Tensor:
    """Which positions predict a token that has a loss, bool [batch, length]; see ``token_losses`` for the labels."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED


def mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of ``values`` [batch, length] over the chosen positions, bool [batch, length]; 0 if there are none."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def squared_error(states: Tensor, target: Tensor) -> Tensor:
    """The mean square of the difference over hidden dimensions: [batch, length] from [batch, length, hidden]."""
    return (states.float() - target.float()).square().mean(-1)


def cosine_distance(states: Tensor, target: Tensor) -> Tensor:
    """1 − cosine, [batch, length] from [batch, length, hidden]."""
    return 1 - F.cosine_similarity(states.float(), target.float(), dim=-1)


def forward_kl(logits: Tensor, teacher: Tensor, top_k: int | None = None) -> Tensor:
    """KL divergence of the model from its teacher, nats, [batch, length] from [batch, length, vocabulary].

    Args:
        logits: the model's.
        teacher: the teacher's.
        top_k: tell apart only the teacher's so many likeliest tokens; all others count as one outcome, so the result
            is never more than the whole divergence. None = all.
    """
    wanted, own = F.log_softmax(teacher.float(), -1), F.log_softmax(logits.float(), -1)
    if top_k is not None and top_k < wanted.shape[-1]:
        chosen = wanted.topk(top_k, -1).indices
        wanted, own = _grouped(wanted, chosen), _grouped(own, chosen)
    return F.kl_div(own, wanted, reduction="none", log_target=True).sum(-1)


def _grouped(logs: Tensor, chosen: Tensor) -> Tensor:
    """Log-probabilities of the chosen tokens, and of all others together: [..., k + 1]."""
    others = logs.scatter(-1, chosen, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logs.gather(-1, chosen), others], -1)
