"""``l0_pruning``: learned gates."""

import dataclasses
import logging
from collections.abc import Iterable

from composer import Callback, Trainer
from transformers import PreTrainedModel

from llmprune.callbacks.l0_pruning import L0Pruning
from llmprune.checkpoints.run_folder import RunFolder
from llmprune.config.sections import SECTIONS
from llmprune.conversion.checkpoint import Checkpoint
from llmprune.conversion.result import Result
from llmprune.estimate.sizes import Learning
from llmprune.models.families import family_of
from llmprune.pruning.gates.chosen_shape import is_chosen
from llmprune.pruning.gates.gate_set import GateSet
from llmprune.pruning.gates.settings import L0PruningConfig, make_goal
from llmprune.training.section import Build, Inputs, Section
from llmprune.training.shape import choose_shape
from llmprune.utils.ranks import on_rank_zero

UNFINISHED = 0.02  # distance from the target sparsity that is worth a warning

log = logging.getLogger(__name__)


@SECTIONS.register("l0_pruning")
class L0PruningSection(Section[L0PruningConfig]):
    """Learned gates that come to a shape or a size."""

    name = "l0_pruning"
    settings = L0PruningConfig
    places = ()
    fixed = ("target", "target_sparsity", "gates")
    prunes = True
    no_auto_microbatch = "while gates train"

    @classmethod
    def durations(cls, own: L0PruningConfig) -> dict[str, tuple[str, int]]:
        """The warm-up of the target."""
        return {"lagrangian_warmup": (own.lagrangian_warmup, 0)}

    def check(self, inputs: Inputs) -> None:
        """See that the model can come to the target."""
        make_goal(inputs.model_config, self.own)

    @property
    def needs_evaluation(self) -> str | None:
        """The uniform shapes of a size are compared."""
        return None if self.own.target_sparsity is None else "the last report of l0_pruning.target_sparsity"

    def callbacks(self, build: Build) -> Iterable[Callback]:
        """``L0Pruning``."""
        return [L0Pruning(self.own, seed=self.config.run.seed, folder=build.folder.gates)]

    def ended(self, trainer: Trainer, folder: RunFolder) -> bool:
        """Choose the uniform shape of the size wanted; also if the run was killed after its last checkpoint."""
        batch = trainer.state.timestamp.batch.value
        if self.own.target_sparsity is None or on_rank_zero(lambda: is_chosen(folder.checkpoints, batch)):
            return False
        choose_shape(trainer, folder)
        return True

    @classmethod
    def learning(cls, own: L0PruningConfig, model: PreTrainedModel, before: Learning) -> Learning:
        """The gates and their multipliers."""
        gates = GateSet(family_of(model.config).shape(model.config), make_goal(model.config, own))
        return dataclasses.replace(before, gates=sum(p.numel() for p in gates.parameters()))

    @classmethod
    def convert(cls, own: L0PruningConfig, checkpoint: Checkpoint, result: Result) -> Result:
        """The plan is what the gates decide."""
        gates = checkpoint.gates()
        assert gates is not None
        _warn_of_unfinished(gates)
        return dataclasses.replace(result, plan=gates.plan(checkpoint.family.name, result.plan.model))


def _warn_of_unfinished(gates: GateSet) -> None:
    """Say so if the gates are not yet near their target: the cut model is then another one than the gated."""
    far = {
        name: (rows.mean().item(), gates.goal.targets[name])
        for name, rows in gates.sparsity().items()
        if (rows - gates.goal.targets[name]).abs().max() > UNFINISHED
    }
    if far:
        listed = ", ".join(f"{name} {now:.3f} of {target:.3f}" for name, (now, target) in far.items())
        log.warning(
            "the gates have not come to their target yet (expected sparsity: %s): the cut model is worse than they "
            "could make it; train longer",
            listed,
        )
