"""``l0_pruning``: learned gates."""

import dataclasses
import logging
import math
from collections.abc import Iterable
from typing import Literal

from composer import Callback, Trainer
from composer.utils import dist
from transformers import PreTrainedModel

from llmprune.callbacks.l0_pruning import L0Pruning
from llmprune.checkpoints.run_folder import RunFolder
from llmprune.config.section_registry import SECTIONS
from llmprune.conversion.checkpoint import Checkpoint
from llmprune.conversion.result import Result
from llmprune.estimate.needs import Needs
from llmprune.models.families import family_of
from llmprune.pruning.gates.attach import attach
from llmprune.pruning.gates.gate_set import GateSet
from llmprune.pruning.gates.settings import L0PruningConfig, make_goal
from llmprune.pruning.gates.shape_record import is_chosen, save_shape
from llmprune.training.section import Build, Inputs, Section
from llmprune.utils.ranks import on_rank_zero

UNFINISHED = 0.02  # a larger distance from the target sparsity causes a warning

log = logging.getLogger(__name__)


@SECTIONS.register("l0_pruning")
class L0PruningSection(Section[L0PruningConfig]):
    """Learned gates that reach a target shape or a target size."""

    name = "l0_pruning"
    settings = L0PruningConfig
    places = ()
    fixed = ("target", "target_sparsity", "gates")
    prunes = True
    no_auto_microbatch = "while gates train"

    @classmethod
    def durations(cls, own: L0PruningConfig) -> dict[str, tuple[str, int]]:
        """The warm-up of the target sparsity."""
        return {"lagrangian_warmup": (own.lagrangian_warmup, 0)}

    def check_inputs(self, inputs: Inputs) -> None:
        """Check that the model can reach the target."""
        make_goal(inputs.model_config, self.own)

    @property
    def needs_evaluation(self) -> str | None:
        """The setting ``target_sparsity``: its candidates for the uniform shape are compared on evaluation samples."""
        return None if self.own.target_sparsity is None else "the last report of l0_pruning.target_sparsity"

    def callbacks(self, build: Build) -> Iterable[Callback]:
        """The callback ``L0Pruning``."""
        return [L0Pruning(self.own, seed=self.config.run.seed, folder=build.folder.gates)]

    def ended(self, trainer: Trainer, folder: RunFolder) -> bool:
        """Choose the uniform shape of the wanted size; also if the run was killed after its last checkpoint."""
        batch = trainer.state.timestamp.batch.value
        if self.own.target_sparsity is None or on_rank_zero(lambda: is_chosen(folder.checkpoints, batch)):
            return False
        choose_shape(trainer, folder)
        return True

    @classmethod
    def needs(cls, own: L0PruningConfig, model: PreTrainedModel, before: Needs) -> Needs:
        """Needs of the gates and their Lagrange multipliers."""
        gates = GateSet(family_of(model.config).shape(model.config), make_goal(model.config, own))
        return dataclasses.replace(before, gates=sum(p.numel() for p in gates.parameters()))

    @classmethod
    def install(cls, own: L0PruningConfig, checkpoint: Checkpoint, model: PreTrainedModel, *, newest: bool) -> None:
        """Attach the gates with the factors that they would have at the end of training."""
        gates = checkpoint.gates()
        assert gates is not None
        factors = gates.factors(gates.at_target())
        attach(model, checkpoint.family, set(factors.trainable())).factors = factors

    @classmethod
    def convert(cls, own: L0PruningConfig, checkpoint: Checkpoint, result: Result) -> Result:
        """Set the plan that the gates decide."""
        gates = checkpoint.gates()
        assert gates is not None
        _warn_of_unfinished(gates)
        return dataclasses.replace(result, plan=gates.plan(checkpoint.family.name, result.plan.model))


def _warn_of_unfinished(gates: GateSet) -> None:
    """Log a warning if the gates are far from their target: the cut model then differs from the gated model."""
    far = {
        name: (rows.mean().item(), gates.goal.targets[name])
        for name, rows in gates.sparsity().items()
        if (rows - gates.goal.targets[name]).abs().max() > UNFINISHED
    }
    if far:
        listed = ", ".join(f"{name} {now:.3f} of {target:.3f}" for name, (now, target) in far.items())
        log.warning(
            "the gates have not reached their target yet (expected sparsity: %s): the cut model is worse than they "
            "could make it; train longer",
            listed,
        )


def choose_shape(trainer: Trainer, run: RunFolder) -> None:
    """Choose the uniform shape to cut to, and print the cost of one shape for every block.

    The candidate shapes of the wanted size that follow from the gates are evaluated under the gates, before anything is
    cut. The choice is saved in the folder of the checkpoints, where ``convert`` finds it.
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
