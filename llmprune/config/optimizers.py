"""The optimisers and learning-rate schedules that a YAML can name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from composer.core import Time
from composer.optim import (
    ComposerScheduler,
    ConstantScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingScheduler,
    CosineAnnealingWithWarmupScheduler,
    DecoupledAdamW,
    LinearScheduler,
    LinearWithWarmupScheduler,
)
from lion_pytorch import Lion

from llmprune.utils.registry import Registry
from llmprune.utils.settings import limited


@dataclass
class OptimizerConfig:
    """The settings of the model's optimiser.

    Attributes:
        name: name of the optimiser: ``decoupled_adamw`` or ``decoupled_lion`` (decay not multiplied by the base
            learning rate), or ``adamw``.
        lr: base learning rate; null = by the number of parameters: about 3e-4 at 0.1 billion, 1e-4 at 1, 5e-5 at 7 and
            2e-5 at 70; four times that for adapters and replacement modules.
        betas: decay rates of the first and second moments (Lion: of the update and of the momentum).
        eps: number added to the denominator of Adam's update.
        weight_decay: weight decay per step.
    """

    name: str = "decoupled_adamw"
    lr: float | None = limited(None, least=0)
    betas: list[float] = limited(make=lambda: [0.9, 0.95], least=0, below=1)
    eps: float = limited(1e-8, above=0)
    weight_decay: float = limited(0.0, least=0)


@dataclass
class SchedulerConfig:
    """The learning-rate schedule: ``cosine``, ``linear`` or ``constant``, after a linear warm-up.

    Attributes:
        name: ``cosine``, ``linear``, ``constant`` or another registered schedule.
        warmup: duration of the warm-up, such as ``320ba`` or ``0.03dur``.
        final: last learning rate divided by the base learning rate (cosine and linear).
    """

    name: str = "cosine"
    warmup: str = "0ba"
    final: float = limited(0.1, least=0, most=1)


OPTIMIZERS: Registry[Callable[[Any, OptimizerConfig], torch.optim.Optimizer]] = Registry("optimizers", "optimiser")
SCHEDULERS: Registry[Callable[[SchedulerConfig], ComposerScheduler]] = Registry("schedulers", "schedule")


@OPTIMIZERS.register("decoupled_adamw")
def _decoupled_adamw(parameters: Any, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW whose decay is not multiplied by the base learning rate."""
    betas = (config.betas[0], config.betas[1])
    return DecoupledAdamW(parameters, _rate(config), betas, config.eps, config.weight_decay)


@OPTIMIZERS.register("decoupled_lion")
def _decoupled_lion(parameters: Any, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Lion whose decay is not multiplied by the base learning rate."""
    betas = (config.betas[0], config.betas[1])
    return Lion(parameters, _rate(config), betas, config.weight_decay, decoupled_weight_decay=True)


@OPTIMIZERS.register("adamw")
def _adamw(parameters: Any, config: OptimizerConfig) -> torch.optim.Optimizer:
    """PyTorch's AdamW."""
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(parameters, _rate(config), betas, config.eps, config.weight_decay)


@SCHEDULERS.register("cosine")
def _cosine(config: SchedulerConfig) -> ComposerScheduler:
    """Cosine decay: half a period of a cosine, after the warm-up."""
    if _warms_up(config):
        return CosineAnnealingWithWarmupScheduler(t_warmup=config.warmup, alpha_f=config.final)
    return CosineAnnealingScheduler(alpha_f=config.final)


@SCHEDULERS.register("linear")
def _linear(config: SchedulerConfig) -> ComposerScheduler:
    """Linear decay, after the warm-up."""
    if _warms_up(config):
        return LinearWithWarmupScheduler(t_warmup=config.warmup, alpha_f=config.final)
    return LinearScheduler(alpha_f=config.final)


@SCHEDULERS.register("constant")
def _constant(config: SchedulerConfig) -> ComposerScheduler:
    """The base learning rate throughout, after the warm-up."""
    return ConstantWithWarmupScheduler(t_warmup=config.warmup) if _warms_up(config) else ConstantScheduler()


def _warms_up(config: SchedulerConfig) -> bool:
    """Return whether there is a warm-up: Composer's schedules with one warn of one that takes no time."""
    return Time.from_timestring(config.warmup).value > 0


def _rate(config: OptimizerConfig) -> float:
    assert config.lr is not None  # ``fill_in`` has set it
    return config.lr
