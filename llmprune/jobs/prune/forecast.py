"""What the whole way would do: its steps with their sizes, and how long each takes on this machine, roughly."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llmprune.config.left_open import learning_rate
from llmprune.data.calibration import LENGTH
from llmprune.data.prepared import PreparedData
from llmprune.jobs.prune.recipe import (
    GATING,
    batch_tokens,
    calibration_samples,
    criteria_of,
    sample_length,
    ways_of,
    written_tokens,
)
from llmprune.jobs.prune.settings import MINUTES, SELF, PruneConfig
from llmprune.models.families import family_of
from llmprune.models.loading import count_parameters, load_model_config
from llmprune.models.number_formats import dtype_for_inference
from llmprune.pruning.budgets.limits import costs_of, limits_of
from llmprune.pruning.budgets.shape_sizes import ShapeSizes
from llmprune.pruning.planning import COMPARED, default_device

UTILISATION = 0.4  # share of the speed of one large matrix product that a model reaches
FORWARD, TRAINING = 2, 6  # operations for a parameter and a token


_REFIT = 2  # forward passes that a fit of matrices takes as long as, about
_SHAPES = 24  # that a search over width compares, about
_AT_MOST: dict[str, Callable[[float], str]] = {
    "params": lambda most: f"at most {most:,.0f} parameters",
    "memory": lambda most: f"at most {most / 1e9:,.3g} GB of weights and cache",
    "latency": lambda most: f"at most {most:.0%} of the source's time for a token",
}


@dataclass(frozen=True)
class Step:
    """A step.

    Attributes:
        name: words for the step.
        about: what it does, with sizes.
        seconds: time it takes; None = not known.
    """

    name: str
    about: str
    seconds: float | None


@dataclass(frozen=True)
class Forecast:
    """The steps of the whole way."""

    steps: list[Step]

    def facts(self) -> dict[str, Any]:
        """The forecast, for JSON."""
        return {"steps": [vars(step) for step in self.steps]}

    def __str__(self) -> str:
        lines = [f"{step.name:16}{_duration(step.seconds):>10}   {step.about}" for step in self.steps]
        total = sum(step.seconds or 0.0 for step in self.steps)
        return "\n".join([*lines, f"{'without evaluation':16}{_duration(total):>8}"])


def _shapes(config: PruneConfig, ways: int) -> int:
    """The number of shapes that are compared, about: with fewer blocks and the full width it is one."""
    tried = min(config.budget.tries, _SHAPES)
    return {"depth": 1, "auto": 1 + (ways - 1) * tried}.get(config.method, ways * tried)


def forecast(model: str, config: PruneConfig) -> Forecast:
    """The steps that ``prune`` would do; only the model's config is read.

    Args:
        model: folder or hub name of the model.
        config: settings.

    Raises:
        UserError: a setting is impossible.
    """
    config.check()
    source = load_model_config(model)
    sizes, device = ShapeSizes(source), default_device()
    limits = limits_of(costs_of(config.budget, sizes, device), sizes.source)
    whole = count_parameters(source)
    smaller = next((limit.most for limit in limits if limit.name == "params"), whole)
    rate = _speed(device) * UTILISATION
    length = min(LENGTH, sample_length(config, source))
    tokens = config.wanted_tokens()
    share = 1 - GATING if config.method == "gates" else 1.0
    recovery = TRAINING * smaller + FORWARD * whole
    minutes = config.minutes or MINUTES
    wanted = share * (minutes * 60 * rate / recovery if tokens is None else float(tokens))
    batch = batch_tokens(wanted)
    blocks = family_of(source).shape(source).layers
    told = ", ".join(_AT_MOST[limit.name](limit.most) for limit in limits)
    if config.budget.vocabulary is not None:
        told += f", {config.budget.vocabulary:,} of {sizes.source.vocabulary or source.vocab_size:,} tokens stay"
    steps = [_data(config, rate, whole)]
    if config.method == "gates":
        gating = wanted * recovery / rate * GATING / share
        steps.append(Step("gates", f"gates train for {GATING:.0%} of the tokens or minutes", gating))
    else:
        names, ways = criteria_of(config.method), ways_of(config.method)
        calibration = calibration_samples(source, length) * length
        steps += [
            Step(
                "scores",
                f"{', '.join(names)} on {calibration:,} tokens, {blocks} blocks",
                FORWARD * whole * calibration / rate,
            ),
            Step(
                "plan",
                f"{', '.join(ways)}: up to {config.budget.tries} shapes each, {told}",
                FORWARD
                * whole
                * (min(COMPARED, calibration) * _shapes(config, len(ways)) + _REFIT * calibration * len(ways))
                / rate,
            ),
        ]
    steps += [
        Step(
            "recovery",
            f"{wanted:,.0f} tokens in batches of {batch:,}, learning rate {learning_rate(smaller):.2g}",
            wanted * recovery / rate,
        ),
        Step("evaluation", "held-out losses, speed and continuations of three models, and the report", None),
    ]
    return Forecast(steps)


def _data(config: PruneConfig, rate: float, parameters: int) -> Step:
    if config.data is None:
        return Step("data", "the built-in corpus: Python documentation and code", None)
    if config.data == SELF:
        written = written_tokens(config)
        words = f"{written:,} tokens that the model writes itself"
        return Step("data", words, written * FORWARD * parameters / rate)
    if "://" in config.data:
        return Step("data", PreparedData(config.data).location, None)
    return Step("data", config.data, None)


def _speed(device: torch.device) -> float:
    """Operations per second of a matrix product of this device, in the number format that models run in."""
    dtype = dtype_for_inference("auto", on_gpu=device.type == "cuda")
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _duration(seconds: float | None) -> str:
    """A time as text.

    >>> _duration(42), _duration(600), _duration(7200), _duration(None)
    ('42 s', '10 min', '2.0 h', '')
    """
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
