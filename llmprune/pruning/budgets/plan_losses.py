"""The calibration loss of a plan before recovery, with the losses of the source and of the uncorrected plan."""

import math
from dataclasses import dataclass, replace

from torch import Tensor

from llmprune.plans.plan import KeptBlock, Plan
from llmprune.pruning.budgets.trial import Trial
from llmprune.utils.errors import UserError

TIE = 1e-3  # nats; a smaller difference is none


class RuinousPlanError(UserError):
    """A plan ruins the model, or loses more than it has to."""


class HarmfulCorrectionError(RuinousPlanError):
    """A plan is better without its corrections."""


@dataclass(frozen=True)
class PlanLosses:
    """Calibration losses, nats per token.

    Attributes:
        source: loss of the source model.
        uncorrected: loss of the plan without its corrections; None = the plan has no corrections.
        plan: loss of the plan as it is written.
        uniform: loss of a uniform guess over the vocabulary.
    """

    source: float
    uncorrected: float | None
    plan: float
    uniform: float

    @classmethod
    def of(cls, plan: Plan, trial: Trial, samples: Tensor | None = None) -> "PlanLosses":
        """Compute the losses.

        Args:
            plan: plan.
            trial: calibration runs of the model that the plan is for.
            samples: tokens, int64 [samples, length]; None = the calibration samples.
        """
        whole = replace(
            plan,
            blocks=tuple(KeptBlock.whole(number) for number in range(plan.source.layers)),
            hidden=None,
            vocabulary=None,
            factors={},
            corrections={},
        )
        uncorrected = trial.loss(replace(plan, corrections={}), samples) if plan.corrections else None
        uniform = math.log(trial.scored.model.config.vocab_size)
        return cls(trial.loss(whole, samples), uncorrected, trial.loss(plan, samples), uniform)

    def refuse_ruinous(self) -> None:
        """Refuse a plan that ruins the model or whose corrections harm it.

        Raises:
            HarmfulCorrectionError: the plan's corrections make it worse.
            RuinousPlanError: the plan is worse than guessing although the source is not.
        """
        if self.uncorrected is not None and not self.plan <= self.uncorrected + TIE:
            raise HarmfulCorrectionError(
                f"the correction makes the plan worse: calibration loss {self.plan:.4f}, without it "
                f"{self.uncorrected:.4f}; leave it out, score more samples, or pass --force"
            )
        if self.source < self.uniform and not self.plan <= self.uniform:
            raise RuinousPlanError(
                f"the plan ruins the model: calibration loss {self.plan:.4f}, a uniform guess has {self.uniform:.4f}; "
                "remove less, or pass --force"
            )

    def facts(self) -> dict[str, float | None]:
        """The losses by name, for JSON."""
        return {"loss": self.plan, "loss_uncorrected": self.uncorrected, "loss_source": self.source}

    def __str__(self) -> str:
        without = "" if self.uncorrected is None else f", {self.uncorrected:.4f} without its correction"
        return f"calibration loss before recovery {self.plan:.4f}{without}; the source has {self.source:.4f}"
