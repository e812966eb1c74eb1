"""Train a few runs one after the other, killing some on their way.

Used in-process, and as a script under the launcher: ``composer -n 2 plain_runs.py CONFIG NAME=override;override …``
where an override ``kill=N`` ends the run in the middle of batch N and goes on with it.
"""

import contextlib
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from llmprune.config.job_files import load_training_job
from llmprune.training.trainer import build_trainer
from tests.callbacks.fixed_noise import KillAt, Killed, named_runs


def run(config: Path, *overrides: str, kill: int | None = None) -> dict[str, torch.Tensor]:
    """Train; the parameters at the end, whole."""
    settings = load_training_job(config, overrides)
    trainer = build_trainer(settings)
    sharded = [isinstance(parameter, DTensor) for parameter in trainer.state.model.parameters()]
    assert all(sharded) if settings.sharding is not None else not any(sharded)
    if kill is not None:
        trainer.state.callbacks.append(KillAt(kill))
    with contextlib.suppress(Killed):
        trainer.fit()
    trainer.close()
    parameters = trainer.state.model.named_parameters()
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.detach() for name, p in parameters}


def main() -> None:
    """Do the runs that the command line names."""
    config, *runs = sys.argv[1:]
    base = Path(load_training_job(config).run.folder).parent
    for _, overrides, kill in named_runs(base, runs):
        if kill is not None:
            run(Path(config), *overrides, kill=kill)
            overrides.append("run.autoresume=true")
        run(Path(config), *overrides)


if __name__ == "__main__":
    main()
