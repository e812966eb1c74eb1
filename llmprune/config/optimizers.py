"""The optimisers and learning-rate schedules that a YAML can name."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    DecoupledAdamW,
    LinearWithWarmupScheduler,
)
from lion_pytorch import Lion


@dataclass
class OptimizerConfig:
    """The model's optimiser.

    Attributes:
        name: ``decoupled_adamw`` or ``decoupled_lion`` (decay not multiplied by the base learning rate), or ``adamw``.
        lr: base learning rate.
        betas: decay of the first and second moments (Lion: of the update and the momentum).
        eps: of Adam's denominator.
        weight_decay: per step.
    """

    name: str = "decoupled_adamw"
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass
class SchedulerConfig:
    """The learning rate's course: ``cosine``, ``linear`` or ``constant``, after a linear warm-up.

    Attributes:
        warmup: duration (``320ba``, ``0.03dur``).
        final: last learning rate / base rate (cosine and linear).
    """

    name: str = "cosine"
    warmup: str = "0ba"
    final: float = 0.1


def _adam(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters, c: kind(parameters, lr=c.lr, betas=tuple(c.betas), eps=c.eps, weight_decay=c.weight_decay)  # type: ignore[call-arg]


OPTIMIZERS: dict[str, Callable[[Any, OptimizerConfig], torch.optim.Optimizer]] = {
    "decoupled_adamw": _adam(DecoupledAdamW),
    "decoupled_lion": lambda parameters, c: Lion(
        parameters, lr=c.lr, betas=tuple(c.betas), weight_decay=c.weight_decay, decoupled_weight_decay=True
    ),
    "adamw": _adam(torch.optim.AdamW),
}
SCHEDULERS: dict[str, Callable[[SchedulerConfig], ComposerScheduler]] = {
    "cosine": lambda c: CosineAnnealingWithWarmupScheduler(t_warmup=c.warmup, alpha_f=c.final),
    "linear": lambda c: LinearWithWarmupScheduler(t_warmup=c.warmup, alpha_f=c.final),
    "constant": lambda c: ConstantWithWarmupScheduler(t_warmup=c.warmup),
}
