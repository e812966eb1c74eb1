"""The settings of scoring."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.utils.errors import UserError
from llmprune.utils.settings import check_settings, limited

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from llmprune.pruning.scoring.criterion import ScoringJob

Reduction = Literal["sum", "mean", "max", "prod"]
Aggregation = Literal["mean", "l2"]


@dataclass
class LayerScoringConfig:
    """Settings of ``LayerScoring``.

    Attributes:
        data: calibration samples.
        criteria: names of criteria; null = all that share their passes through the model: all but taylor_entropy and
            unit_taylor_entropy (with offloading: all that need no gradients).
        batch_size: number of samples that pass through a block at a time.
        row_reduction: reduction of magnitudes and Taylor scores over the rows of a matrix: sum, mean, max or prod.
        matrix_reduction: reduction of magnitudes and Taylor scores over the matrices of a block: sum, mean, max or
            prod.
        sequence_aggregation: aggregation of units' activations over the tokens of a sample: mean or l2 (root mean
            square).
        batch_aggregation: aggregation of units' activations over samples: mean or l2 (root mean square).
        seed: seed of the criteria ``random`` and ``unit_random``.
    """

    data: CalibrationConfig = field(default_factory=CalibrationConfig)
    criteria: list[str] | None = None
    batch_size: int = limited(8, least=1)
    row_reduction: Reduction = "sum"
    matrix_reduction: Reduction = "sum"
    sequence_aggregation: Aggregation = "l2"
    batch_aggregation: Aggregation = "l2"
    seed: int = limited(17, least=0)

    def names(self, model: "PretrainedConfig", *, gradients: bool = True) -> list[str]:
        """The names of the criteria to compute.

        Args:
            model: config of the model to score.
            gradients: whether "all" includes criteria that need gradients.

        Raises:
            UserError: a criterion is unknown or not for this model, or a setting is unknown.
        """
        from llmprune.models.families import family_of
        from llmprune.pruning.scoring.all_criteria import CRITERIA
        from llmprune.pruning.scoring.criterion import GRADIENTS

        check_settings(self)
        experts = family_of(model).shape(model).experts is not None
        kinds = {name: CRITERIA[name] for name in CRITERIA}
        possible = [
            name
            for name, kind in kinds.items()
            if (gradients or kind.reads not in GRADIENTS)
            and kind.reads != "entropy_gradients"
            and (experts or not kind.needs_experts)
        ]
        names = possible if self.criteria is None else list(dict.fromkeys(self.criteria))
        if not names:
            raise UserError(f"no criteria: choose some of {', '.join(CRITERIA)}")
        for name in names:
            if CRITERIA[name].needs_experts and not experts:
                raise UserError(f"{name} is of mixtures of experts: this model has no experts")
        return names

    def job(self, model: "PretrainedConfig", device: "torch.device") -> "ScoringJob":
        """The description of the job that criteria are made with."""
        from llmprune.pruning.scoring.criterion import ScoringJob

        return ScoringJob(
            model,
            device,
            self.row_reduction,
            self.matrix_reduction,
            self.sequence_aggregation,
            self.batch_aggregation,
            self.seed,
        )
