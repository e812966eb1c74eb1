"""Losses of each token: the next-token loss, and distances between a model and its teacher or source."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmprune.models.autocast import in_autocast
from llmprune.models.vocabulary import Head, Measure, mean_loss

IGNORED = -100  # label that PyTorch's losses ignore
OBJECTIVES = {
    "mse": "mean squared error of hidden states",
    "cosine": "1 − cosine of hidden states",
    "lm": "next-token loss of the model that learns",
    "kl": "forward KL divergence from the teacher's (or source's) predictions",
}
HIDDEN_OBJECTIVES = ("mse", "cosine")
LOCAL = "local"  # an objective of distillation alone: ``mse`` of every block by itself, given the teacher's states
Divergence = Callable[[Tensor, slice], Tensor]
"""The KL divergence of logits [tokens, vocabulary] from a teacher's for a part of the tokens: nats, [tokens]."""


def next_tokens(labels: Tensor) -> Tensor:
    """The token that follows each position, ``IGNORED`` at the end, int64 [batch, length] both."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def predicting(labels: Tensor) -> Tensor:
    """The positions that predict a token with a loss, bool [batch, length]; ``token_losses`` describes the labels."""
    return next_tokens(labels) != IGNORED


def places(chosen: Tensor) -> Tensor:
    """The indices of the chosen positions, int64 [chosen], in [batch · length], from bool [batch, length].

    Indexing by a mask makes the host wait for a GPU every time, and once more in the backward pass; indexing by these
    indices does not.
    """
    return chosen.flatten().nonzero().flatten()


def next_token(targets: Tensor) -> Measure:
    """A measure: the negative log-likelihood (nats) of each token's target, int64 [tokens]; 0 if it is ``IGNORED``."""

    def measure(logits: Tensor, part: slice) -> Sequence[Tensor]:
        return (F.cross_entropy(logits, targets[part], ignore_index=IGNORED, reduction="none"),)

    return measure


def mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of ``values`` [batch, length] over the chosen positions, bool [batch, length]; 0 if none is chosen."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def squared_error(states: Tensor, target: Tensor) -> Tensor:
    """The mean square of the difference over hidden dimensions: [batch, length] from [batch, length, hidden]."""
    return (states.float() - target.float()).square().mean(-1)


def relative_error(states: Tensor, target: Tensor) -> Tensor:
    """The squared error divided by the target's mean square, [batch, length] from [batch, length, hidden]."""
    return squared_error(states, target) / target.float().square().mean(-1).clamp(min=1e-9)


def cosine_distance(states: Tensor, target: Tensor) -> Tensor:
    """1 − cosine, [batch, length] from [batch, length, hidden]."""
    return 1 - F.cosine_similarity(states.float(), target.float(), dim=-1)


def forward_kl(logits: Tensor, teacher: Tensor, top_k: int | None = None, temperature: float = 1.0) -> Tensor:
    """KL divergence of the model from its teacher, in nats, [...] from [..., vocabulary].

    Args:
        logits: logits of the model, [..., vocabulary].
        teacher: logits of the teacher, [..., vocabulary].
        top_k: number of the teacher's likeliest tokens that are compared one by one; all others count as one outcome,
            so the result is never more than the full divergence. None = all.
        temperature: divisor of both logits; the result is multiplied by its square, so that the gradient keeps its size
            (Hinton et al., arXiv:1503.02531).
    """
    if top_k is not None and top_k < teacher.shape[-1]:
        return kl_to_likeliest(logits, *likeliest(teacher, top_k, temperature), temperature)
    wanted, own = (F.log_softmax(x.float() / temperature, -1) for x in (teacher, logits))
    return F.kl_div(own, wanted, reduction="none", log_target=True).sum(-1) * temperature**2


def likeliest(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens, int64 [..., k], and their log-probabilities, float32, from logits [..., vocabulary]."""
    logs, tokens = F.log_softmax(logits.float() / temperature, -1).topk(k, -1)
    return tokens, logs


def kl_to_likeliest(logits: Tensor, tokens: Tensor, logs: Tensor, temperature: float = 1.0) -> Tensor:
    """``forward_kl`` to a teacher's ``likeliest`` tokens only, in nats, [...] from logits [..., vocabulary].

    Args:
        logits: logits of the model, [..., vocabulary].
        tokens: likeliest tokens of the teacher, int64 [..., k].
        logs: log-probabilities of these tokens by the teacher at this temperature, [..., k].
        temperature: divisor of the logits, see ``forward_kl``.
    """
    own = F.log_softmax(logits.float() / temperature, -1)
    others = own.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    rest = (1 - logs.exp().sum(-1)).clamp(min=1e-9)  # above float32's rounding error
    kept = (logs.exp() * (logs - own.gather(-1, tokens))).sum(-1)
    return (kept + rest * (rest.log() - others)) * temperature**2


def divergence_from(
    final: Tensor,
    head: Head,
    top_k: int | None,
    temperature: float,
    translated: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> Divergence:
    """How far predictions are from those of a model that does not learn.

    Args:
        final: the states before its output layer, [tokens, hidden].
        head: its output layer.
        top_k: see ``forward_kl``.
        temperature: see ``forward_kl``.
        translated: function that makes logits of the learning model's vocabulary from those of this one.
    """
    states = in_autocast(final)
    cast = head.cast(states.dtype)

    def divergence(logits: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            own = states[part]
            wanted = torch.cat([translated(cast.logits(own[piece])) for piece in cast.chunks(len(own))])
        return forward_kl(logits, wanted, top_k, temperature)

    return divergence


def loss_of_predictions(
    states: Tensor, head: Head, targets: Tensor, divergence: Divergence | None, weights: Mapping[str, float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the objectives that look at predictions: kl and lm.

    Args:
        states: of the model that learns, before its output layer, [tokens, hidden].
        head: its output layer.
        targets: the token that follows each, int64 [tokens].
        divergence: from a teacher, for kl.
        weights: of the objectives by name; others than kl and lm are left out.

    Returns:
        The sum, and the mean of each objective without its weight. Without kl and lm: 0, and none.
    """
    names = [name for name in ("kl", "lm") if name in weights]
    following = next_token(targets)

    def measure(logits: Tensor, part: slice) -> list[Tensor]:
        found = []
        if "kl" in weights and divergence is not None:
            found.append(divergence(logits, part))
        return [*found, *(following(logits, part) if "lm" in weights else [])]

    if not names:
        return states.sum() * 0.0, {}
    loss, means = mean_loss(states, head, measure, [weights[name] for name in names])
    return loss, dict(zip(names, means, strict=True))
