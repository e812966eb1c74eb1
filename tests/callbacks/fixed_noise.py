"""Run a few batches of pruning with the noise held fixed and save gradients and gates.

Used in-process, and as a script under the launcher: ``composer -n 2 fixed_noise.py CONFIG OUT``.
"""

import sys
from pathlib import Path

import torch
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

from llmprune import training
from llmprune.callbacks.l0_pruning import L0Pruning
from llmprune.config import load_config
from llmprune.gates.gate_set import GateSet


def spread(gates: GateSet) -> None:
    """Set the gates where most samples lie between zero and one, so that gradients flow."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for log_alpha in gates.log_alpha.values():
            log_alpha.copy_(torch.randn(log_alpha.shape, generator=generator))


class FixedNoise(L0Pruning):
    """The same noise for every batch, microbatch and rank; collects the gates' gradients of every batch."""

    def init(self, state: State, logger: Logger) -> None:
        super().init(state, logger)
        spread(self.gates)

    def noise_key(self, batch: int, microbatch: int, rank: int) -> tuple[int, ...]:
        return (self.seed,)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        super().after_train_batch(state, logger)
        gates = {name: parameter.detach().clone() for name, parameter in self.gates.named_parameters()}
        grads = {f"grad.{name}": p.grad.clone() for name, p in self.gates.named_parameters() if p.grad is not None}
        self.history = [*getattr(self, "history", []), {**gates, **grads}]


def run(config: Path, out: Path, *overrides: str) -> list[dict[str, torch.Tensor]]:
    """Train and save this rank's history as OUT.RANK."""
    training.L0Pruning = FixedNoise  # type: ignore[misc,assignment]
    try:
        trainer = training.build_trainer(load_config(config, overrides))
    finally:
        training.L0Pruning = L0Pruning  # type: ignore[misc]
    trainer.fit()
    callback = next(c for c in trainer.state.callbacks if isinstance(c, FixedNoise))
    torch.save(callback.history, f"{out}.{dist.get_global_rank()}")
    trainer.close()
    return callback.history


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
