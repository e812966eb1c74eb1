"""The run's metrics on the console, one line at a time."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from composer.core import State, Time, TimeUnit
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from llmprune.utils.logs import show
from llmprune.utils.progress import duration

HELD_OUT, RATE = "metrics/eval/", "throughput/tokens_per_sec"
EVALUATED = (HELD_OUT, "tasks/", "perplexity/")  # metrics of evaluations


class ConsoleLines(LoggerDestination):
    """Prints one line for every interval of training, and one for every evaluation, by rank 0.

    For example::

        batch 100/3,200 (3 %)  loss 3.2140  lr 2.90e-04  4,120 tokens/s  12 min left
        batch 400/3,200  held-out loss 3.1022 (code 2.9110, docs 3.2412), perplexity 22.25

    ``metrics.jsonl`` has all metrics.
    """

    def __init__(self, interval: str) -> None:
        """Set the interval between two lines of training, such as ``10ba``, ``100000tok`` or ``0.01dur``."""
        self._interval = Time.from_timestring(interval)
        self._active = dist.get_global_rank() == 0
        self._metrics: dict[str, Any] = {}
        self._done = 0
        self._clock: tuple[float, float] | None = None  # seconds, and the share of the run, at the last line
        self._evaluating = 0.0  # seconds of evaluations since then

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Keep the newest value of every metric."""
        self._metrics.update(metrics)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Start the clock."""
        self._clock, self._done = (time.monotonic(), _share(state)), self._count(state)
        self._evaluating = 0.0

    def batch_end(self, state: State, logger: Logger) -> None:
        """Print a line at the end of an interval, and at the end of the run."""
        if (count := self._count(state)) == self._done and _share(state) < 1:
            return
        self._done = count
        found = [
            f"batch {_place(state)} ({_share(state):.0%})".replace("%)", " %)"),
            *_losses(self._metrics),
            *_rates(self._metrics),
        ]
        if (left := self._left(state)) is not None:
            found.append(f"{duration(left)} left")
        self._print("  ".join([*found, *_gates(self._metrics)]))
        self._clock, self._evaluating = (time.monotonic(), _share(state)), 0.0

    def eval_start(self, state: State, logger: Logger) -> None:
        """Note when the evaluation begins."""
        self._evaluating -= time.monotonic()

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Print a line with the results of an evaluation."""
        self._evaluating += time.monotonic()
        named = self._metrics
        domains = [
            f"{name.removeprefix(f'{HELD_OUT}loss/')} {_digits(value)}"
            for name, value in named.items()
            if name.startswith(f"{HELD_OUT}loss/")
        ]
        found = [f"batch {_place(state)}"]
        if (loss := named.get(f"{HELD_OUT}loss")) is not None:
            listed = f" ({', '.join(domains)})" if len(domains) > 1 else ""
            found.append(f"held-out loss {_digits(loss)}{listed}, perplexity {named[f'{HELD_OUT}perplexity']:.4g}")
        found += [f"{name} {value:.4g}" for name, value in named.items() if name.startswith(EVALUATED[1:])]
        if len(found) > 1:
            self._print("  ".join(found))
        self._metrics = {name: value for name, value in named.items() if not name.startswith(EVALUATED)}

    def eval_standalone_end(self, state: State, logger: Logger) -> None:
        """Print a line with the results of an evaluation before training, or without training."""
        self.eval_after_all(state, logger)

    def _count(self, state: State) -> int:
        """Return how many intervals are complete."""
        if self._interval.unit == TimeUnit.DURATION:
            return int(_share(state) / self._interval.value + 1e-9)
        return int(state.timestamp.get(self._interval.unit).value // self._interval.value)

    def _left(self, state: State) -> float | None:
        """Return the seconds that the rest of training takes at the speed since the last line, if it is known."""
        if self._clock is None:
            return None
        seconds, share = time.monotonic() - self._clock[0] - self._evaluating, _share(state) - self._clock[1]
        return None if share <= 0 or _share(state) >= 1 else seconds / share * (1 - _share(state))

    def _print(self, line: str) -> None:
        if self._active:
            show(line)


def _share(state: State) -> float:
    """Return the share of the run that is done."""
    done = state.get_elapsed_duration()
    return 1.0 if done is None else min(float(done.value), 1.0)


def _place(state: State) -> str:
    """Return the batch, and the number of batches if the run is measured in them."""
    whole = state.max_duration
    batch = state.timestamp.batch.value
    return f"{batch:,}/{whole.value:,}" if whole is not None and whole.unit == TimeUnit.BATCH else f"{batch:,}"


def _digits(value: float) -> str:
    """A loss with four decimals, or with three digits if it is small."""
    return f"{value:.4f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


def _losses(metrics: Mapping[str, Any]) -> Iterator[str]:
    for name, value in metrics.items():
        if name == "loss/train/total":
            yield f"loss {_digits(value)}"
    for name, value in metrics.items():
        if name.startswith("loss/") and name != "loss/train/total":
            yield f"{name.removeprefix('loss/').removeprefix('train/')} {_digits(value)}"


def _rates(metrics: Mapping[str, Any]) -> Iterator[str]:
    rates = [value for name, value in metrics.items() if name.startswith("lr-")]
    if rates:
        yield f"lr {rates[0]:.2e}"
    if RATE in metrics:
        yield f"{metrics[RATE]:,.0f} tokens/s"


def _gates(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Yield the expected sparsity of every constraint beside its target, if there are gates."""
    found = []
    for name, value in metrics.items():
        if name.startswith("l0/") and name.endswith("/expected_sparsity"):
            kind = name.removeprefix("l0/").removesuffix("/expected_sparsity")
            found.append(f"{kind} {value:.3f} of {metrics.get(f'l0/{kind}/target_sparsity', 0.0):.3f}")
    if found:
        yield f"sparsity {', '.join(found)}"
