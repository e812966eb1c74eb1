"""Train with hybrid sharding on CPUs: ``composer -n 4 hybrid_runs.py CONFIG NAME=override;override …``.

Gloo has no mean over ranks, which FSDP2 asks NCCL for; here it sums and divides afterwards, which is the same. All else
is what GPUs do.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group

from llmprune.config.job_files import load_training_job
from llmprune.config.sharding import AverageGradients
from llmprune.training import checks, trainer
from tests.callbacks import fixed_noise, plain_runs


class NotNeeded(AverageGradients):
    """Gradients are means already."""

    def match(self, *_: Any) -> bool:
        return False


def main() -> None:
    """Do the runs that the command line names."""

    def factors(scatter: Any, reduce: Any, *_: Any) -> tuple[float, float]:
        return 1.0, float(scatter.size() * (1 if reduce is None else reduce.size()))

    reduce_and_wait = _fsdp_param_group.foreach_reduce

    def reduce_at_once(*arguments: Any) -> Any:
        found = list(reduce_and_wait(*arguments))
        if found[3] is not None:  # the sum over groups has its event, which CPUs do not make
            found[4] = torch.cpu.Event()
        return tuple(found)

    _fsdp_collectives._get_gradient_divide_factors = factors
    _fsdp_param_group.foreach_reduce = reduce_at_once
    checks.check_sharding = lambda *_, **__: None  # type: ignore[assignment]
    trainer.AverageGradients = NotNeeded  # type: ignore[misc]
    config, *runs = sys.argv[1:]
    base = Path(load_training_job(config).run.folder).parent
    for name, overrides, _ in fixed_noise.named_runs(base, runs):
        if any(override.startswith("l0_pruning=") for override in overrides):
            history = fixed_noise.run(Path(config), *overrides)
            torch.save(history, base / name / f"history.{dist.get_global_rank()}")
        else:
            plain_runs.run(Path(config), *overrides)


if __name__ == "__main__":
    main()
