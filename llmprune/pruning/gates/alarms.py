"""Warnings about gates that collapse or do not change, and messages about gates that have reached their target."""

import logging
from collections.abc import Mapping

STILL, GAP, MOVED = 50, 0.05, 1e-4  # batches between checks; distance from target; smallest change
THERE = 0.005  # largest distance at which the final target counts as reached

log = logging.getLogger(__name__)


class GateAlarms:
    """Warns once about each problem in the training of gates, and logs once that each target is reached."""

    def __init__(self) -> None:
        """Start with no observations."""
        self._before: dict[str, float] = {}
        self._warned: set[tuple[str, str]] = set()
        self._reached: set[str] = set()

    def look(
        self,
        batch: int,
        warmup: float,
        expected: Mapping[str, float],
        targets: Mapping[str, float],
        left: Mapping[str, float],
    ) -> None:
        """Check the gates after one batch.

        Args:
            batch: number of the batch.
            warmup: progress of the target's warm-up (1 = ended).
            expected: expected sparsity of every constraint, by name.
            targets: current target sparsity of every constraint, by name.
            left: expected number of gates that stay in the emptiest row (for a block's units: in the emptiest block),
                by kind.
        """
        if warmup < 1:
            for kind, count in left.items():
                if count < 0.5:
                    self._warn(
                        ("collapse", kind),
                        f"all {kind} gates of one row are zero at batch {batch}, before the warm-up has ended: lower "
                        "l0_pruning.gate_lr or lengthen l0_pruning.lagrangian_warmup",
                    )
        else:
            self._say_reached(batch, expected, targets)
        if batch % STILL:
            return
        for name, target in targets.items():
            before, now = self._before.get(name), expected[name]
            if before is not None and abs(now - target) > GAP and abs(now - before) < MOVED:
                self._warn(
                    ("still", name),
                    f"the expected sparsity of {name} has stayed at {now:.4f} for {STILL} batches; its target is "
                    f"{target:.4f}: raise l0_pruning.gate_lr or l0_pruning.multiplier_lr",
                )
        self._before = {name: expected[name] for name in targets}

    def _say_reached(self, batch: int, expected: Mapping[str, float], targets: Mapping[str, float]) -> None:
        for name, target in targets.items():
            if name not in self._reached and abs(expected[name] - target) < THERE:
                self._reached.add(name)
                log.info("the expected sparsity of %s has reached its target, %.4f, at batch %d", name, target, batch)

    def _warn(self, alarm: tuple[str, str], message: str) -> None:
        if alarm not in self._warned:
            self._warned.add(alarm)
            log.warning(message)
