"""The uniform shape of a model that was pruned to a size: chosen by its held-out loss once the run has ended."""

import math
from typing import Literal

from composer import Trainer
from composer.utils import dist

from llmprune.callbacks.l0_pruning import L0Pruning
from llmprune.checkpoints.run_folder import RunFolder
from llmprune.pruning.gates.chosen_shape import save_shape


def choose_shape(trainer: Trainer, run: RunFolder) -> None:
    """Choose the uniform shape that is cut, and say what it costs that every block has the same.

    The shapes of the size wanted that follow from the gates are evaluated under the gates, before anything is cut. The
    choice lies beside the checkpoints, where ``convert`` finds it.
    """
    pruning = next(callback for callback in trainer.state.callbacks if isinstance(callback, L0Pruning))
    gates = pruning.gates
    learned = _held_out(trainer, pruning, "expected")
    rivals = gates.goal.counts(gates.keep_probability())
    losses = []
    for gates.chosen in rivals:
        losses.append(_held_out(trainer, pruning, "target"))
    best = min(range(len(rivals)), key=lambda place: losses[place] if math.isfinite(losses[place]) else math.inf)
    gates.chosen = rivals[best]
    if best != len(rivals) - 1:
        _held_out(trainer, pruning, "target")  # the last evaluation is that of the result
    if dist.get_global_rank() == 0:
        print(f"the loss is {learned:.4f} with the gates as learned, which may differ from block to block")
        print("the model is cut to one shape for all blocks; those of the size wanted:")
        for place, counts in enumerate(rivals):
            gates.chosen = counts
            mark = "chosen" if place == best else ""
            print(f"  {gates.plan('', '').shape}: loss {losses[place]:.4f} {mark}".rstrip())
        gates.chosen = rivals[best]
        save_shape(run.checkpoints, trainer.state.timestamp.batch.value, rivals, losses, best)


def _held_out(trainer: Trainer, pruning: L0Pruning, manner: Literal["expected", "target"]) -> float:
    pruning.evaluate_at = manner
    trainer.eval()
    return float(trainer.state.eval_metric_values["loss"])
