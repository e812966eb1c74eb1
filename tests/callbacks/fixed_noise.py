"""Run a few batches of pruning with the noise held fixed and keep gradients and gates of every batch.

Used in-process, and as a script under the launcher for several runs one after the other:
``composer -n 2 fixed_noise.py CONFIG NAME=override;override NAME=override …`` where an override ``kill=N`` ends the run
at batch N and goes on with it. Every run saves RUN_FOLDER/history.RANK.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed.tensor import DTensor

from llmprune.callbacks.l0_pruning import L0Pruning
from llmprune.config.job_files import load_training_job
from llmprune.pruning.gates.gate_set import GateSet
from llmprune.training import checks
from llmprune.training.sections import l0_pruning as section
from llmprune.training.trainer import build_trainer

History = list[dict[str, torch.Tensor]]


def spread(gates: GateSet) -> None:
    """Set the gates where most samples lie between zero and one, so that gradients flow."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for log_alpha in gates.log_alpha.values():
            log_alpha.copy_(torch.randn(log_alpha.shape, generator=generator))


class FixedNoise(L0Pruning):
    """The same noise for every batch, microbatch and rank; collects the gates' gradients of every batch."""

    history: History

    def init(self, state: State, logger: Logger) -> None:
        super().init(state, logger)
        spread(self.gates)
        self.history = []

    def noise_key(self, batch: int, microbatch: int, rank: int) -> tuple[int, ...]:
        return (self.seed,)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        super().after_train_batch(state, logger)
        gates = {name: parameter.detach().clone() for name, parameter in self.gates.named_parameters()}
        grads = {f"grad.{name}": p.grad.clone() for name, p in self.gates.named_parameters() if p.grad is not None}
        self.history.append({**gates, **grads})


FixedNoise.__qualname__ = "L0Pruning"  # the name under which Composer keeps its state


class Killed(BaseException):
    """As if the process had died."""


class KillAt(Callback):
    """Dies in the middle of a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def after_forward(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == self.batch:
            raise Killed


def run(config: Path, *overrides: str, kill: int | None = None) -> History:
    """Train, and return what was collected."""
    section.L0Pruning = FixedNoise  # type: ignore[misc,assignment]
    try:
        settings = load_training_job(config, overrides)
        trainer = build_trainer(settings)
    finally:
        section.L0Pruning = L0Pruning  # type: ignore[misc]
    sharded = [isinstance(parameter, DTensor) for parameter in trainer.state.model.parameters()]
    assert all(sharded) if settings.sharding is not None else not any(sharded)
    if kill is not None:
        trainer.state.callbacks.append(KillAt(kill))
    with contextlib.suppress(Killed):
        trainer.fit()
    callback = next(c for c in trainer.state.callbacks if isinstance(c, FixedNoise))
    trainer.close()
    return callback.history


def evaluate(config: Path, *overrides: str) -> float:
    """The loss before training: hybrid sharding trains on GPUs only, but its mesh and its forward pass are the same."""
    settings = load_training_job(config, overrides)
    if settings.sharding is not None:
        checks.check_sharding = lambda *_, **__: None  # type: ignore[assignment]
    trainer = build_trainer(settings)
    if settings.sharding is not None:
        placements = {str(parameter.placements) for parameter in trainer.state.model.parameters()}
        assert placements == {"(Replicate(), Shard(dim=0))"}, placements
    trainer.eval()
    trainer.close()
    return float(trainer.state.eval_metric_values["loss"])


def named_runs(base: Path, arguments: list[str]) -> Iterator[tuple[str, list[str], int | None]]:
    """Name, overrides and the batch of the kill of every run that a command line names."""
    for name, _, listed in (argument.partition("=") for argument in arguments):
        overrides = [f"run.folder={base}/{name}", *filter(None, listed.split(";"))]
        kill = next((int(o.removeprefix("kill=")) for o in overrides if o.startswith("kill=")), None)
        yield name, [o for o in overrides if not o.startswith("kill=")], kill


def main() -> None:
    """Do the runs that the command line names."""
    config, *runs = sys.argv[1:]
    base = Path(load_training_job(config).run.folder).parent
    for name, overrides, kill in named_runs(base, runs):
        if name == "hybrid":
            torch.save(evaluate(Path(config), *overrides), base / name / "loss")
            continue
        if kill is not None:
            run(Path(config), *overrides, kill=kill)
            overrides.append("run.autoresume=true")
        history = run(Path(config), *overrides)
        torch.save(history, base / name / f"history.{dist.get_global_rank()}")


if __name__ == "__main__":
    main()
