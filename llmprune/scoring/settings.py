"""The settings of scoring and of the plans that follow from it."""

from dataclasses import dataclass, field

from llmprune.data.calibration import CalibrationConfig
from llmprune.errors import UserError, nearest
from llmprune.scoring.criteria import CRITERIA
from llmprune.scoring.reductions import REDUCTIONS


@dataclass
class LayerScoringConfig:
    """Settings of ``LayerScoring``.

    Attributes:
        data: the calibration samples.
        criteria: names of criteria; null = all (offloaded: all that need no gradients).
        batch_size: samples that go through a block at a time.
        row_reduction: of magnitudes and Taylor scores, over the rows of a matrix: sum, mean, max or prod.
        matrix_reduction: of them, over a block's matrices.
        seed: of the criterion ``random``.
    """

    data: CalibrationConfig = field(default_factory=CalibrationConfig)
    criteria: list[str] | None = None
    batch_size: int = 8
    row_reduction: str = "sum"
    matrix_reduction: str = "sum"
    seed: int = 17

    def names(self, *, gradients: bool = True) -> list[str]:
        """The criteria asked for.

        Args:
            gradients: whether "all" holds those that need gradients.

        Raises:
            UserError: one is unknown, or a setting is.
        """
        for name, value in (("row_reduction", self.row_reduction), ("matrix_reduction", self.matrix_reduction)):
            if value not in REDUCTIONS:
                raise UserError(f"{name} '{value}' is unknown; {nearest(value, REDUCTIONS)}")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}; it must be positive")
        if self.seed < 0 or self.data.seed < 0:
            raise UserError(f"seed is {min(self.seed, self.data.seed)}; it must be zero or positive")
        possible = [name for name in CRITERIA.names() if gradients or CRITERIA.get(name).reads != "gradients"]
        names = possible if self.criteria is None else list(dict.fromkeys(self.criteria))
        if not names:
            raise UserError(f"no criteria: choose some of {', '.join(CRITERIA.names())}")
        for name in names:
            CRITERIA.get(name)
        return names
