"""The settings of scoring."""

from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig

from llmprune.data.calibration import CalibrationConfig
from llmprune.models.families import family_of
from llmprune.pruning.scoring.all_criteria import CRITERIA
from llmprune.pruning.scoring.criterion import ScoringJob
from llmprune.pruning.scoring.units import AGGREGATIONS
from llmprune.pruning.scoring.weights import REDUCTIONS
from llmprune.utils.errors import UserError, nearest


@dataclass
class LayerScoringConfig:
    """Settings of ``LayerScoring``.

    Attributes:
        data: the calibration samples.
        criteria: names of criteria; null = all (offloaded: all that need no gradients).
        batch_size: samples that go through a block at a time.
        row_reduction: of magnitudes and Taylor scores, over the rows of a matrix: sum, mean, max or prod.
        matrix_reduction: of them, over a block's matrices.
        sequence_aggregation: of the activations of units, over the tokens of a sample: mean or l2 (root mean square).
        batch_aggregation: of them, over samples.
        seed: of the criteria ``random`` and ``unit_random``.
    """

    data: CalibrationConfig = field(default_factory=CalibrationConfig)
    criteria: list[str] | None = None
    batch_size: int = 8
    row_reduction: str = "sum"
    matrix_reduction: str = "sum"
    sequence_aggregation: str = "mean"
    batch_aggregation: str = "mean"
    seed: int = 17

    def names(self, model: PretrainedConfig, *, gradients: bool = True) -> list[str]:
        """The criteria asked for.

        Args:
            model: the config of what is scored.
            gradients: whether "all" holds those that need gradients.

        Raises:
            UserError: one is unknown or not for this model, or a setting is unknown.
        """
        for name, value in (
            ("sequence_aggregation", self.sequence_aggregation),
            ("batch_aggregation", self.batch_aggregation),
        ):
            if value not in AGGREGATIONS:
                raise UserError(f"{name} '{value}' is unknown; {nearest(value, AGGREGATIONS)}")
        for name, value in (("row_reduction", self.row_reduction), ("matrix_reduction", self.matrix_reduction)):
            if value not in REDUCTIONS:
                raise UserError(f"{name} '{value}' is unknown; {nearest(value, REDUCTIONS)}")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; it must be positive")
        if self.seed < 0 or self.data.seed < 0:
            raise UserError(f"seed is {min(self.seed, self.data.seed)}; it must be zero or positive")
        experts = family_of(model).shape(model).experts is not None
        kinds = {name: CRITERIA[name] for name in CRITERIA}
        possible = [
            name
            for name, kind in kinds.items()
            if (gradients or kind.reads != "gradients") and (experts or not kind.needs_experts)
        ]
        names = possible if self.criteria is None else list(dict.fromkeys(self.criteria))
        if not names:
            raise UserError(f"no criteria: choose some of {', '.join(CRITERIA)}")
        for name in names:
            if CRITERIA[name].needs_experts and not experts:
                raise UserError(f"{name} is of mixtures of experts: this model has no experts")
        return names

    def job(self, model: PretrainedConfig, device: torch.device) -> ScoringJob:
        """What the criteria know of ``model`` before they see anything."""
        return ScoringJob(
            model,
            device,
            self.row_reduction,
            self.matrix_reduction,
            self.sequence_aggregation,
            self.batch_aggregation,
            self.seed,
        )
