"""The settings of distillation."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from llmprune.models.objectives import HIDDEN_OBJECTIVES, OBJECTIVES
from llmprune.models.placement import TEACHER
from llmprune.utils.errors import UserError, nearest


@dataclass
class DistillationConfig:
    """A teacher, usually the model before it was pruned, whose predictions and states the model learns to give.

    Attributes:
        teacher: a Hugging Face folder or hub name with the same tokenizer; null = while gates train, the same model
            with open gates; else predictions kept with the data (``python -m data_prep teach``).
        objectives: weights of what is minimised: kl (forward, of predictions), lm (next-token loss), mse and cosine (of
            the states after blocks; mse as a share of the teacher's mean square); none given = kl.
        final_objectives: their weights at the end of the run, reached in a straight line; none given = the same.
        temperature: divides the logits of both.
        top_k: tell apart so many of the teacher's likeliest tokens; null = all, or as many as were kept.
        plan: by which the model was cut out of the teacher: says which blocks and hidden dimensions are compared; null
            = the one in the model's folder, if there is one.
        blocks: of the model, whose states are compared; null = all.
        dtype: of the teacher's weights: bfloat16 or float32; auto = bfloat16 on GPUs and on processors that have it.
    """

    teacher: str | None = None
    objectives: dict[str, float] = field(default_factory=dict)
    final_objectives: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    top_k: int | None = None
    plan: str | None = None
    blocks: list[int] | None = None
    dtype: str = "auto"

    def check(self) -> None:
        """Raise ``UserError`` for what is wrong whatever the models."""
        for key, objectives in (("objectives", self.objectives), ("final_objectives", self.final_objectives)):
            for name, weight in objectives.items():
                if name not in OBJECTIVES:
                    raise UserError(f"distillation.{key}: there is no objective '{name}'; {nearest(name, OBJECTIVES)}")
                if not 0 <= weight < float("inf"):
                    raise UserError(f"distillation.{key}: the weight of {name} is {weight}; it must be zero or more")
            if objectives and not any(objectives.values()):
                raise UserError(f"distillation.{key} need a positive weight: write {{kl: 1.0}}")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"distillation.temperature is {self.temperature}; it must be positive")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"distillation.top_k is {self.top_k}; it must be positive")
        if "kl" not in self.names and (self.top_k is not None or self.temperature != 1):
            raise UserError("distillation.temperature and top_k belong to the objective kl")
        if self.dtype not in TEACHER:
            raise UserError(f"distillation.dtype '{self.dtype}' is unknown; {nearest(self.dtype, TEACHER)}")
        if self.blocks is not None and not self.compares_states:
            raise UserError("distillation.blocks belongs to the objectives mse and cosine")
        if not self.names - {"lm"}:
            raise UserError("distillation.objectives has lm alone, which needs no teacher: leave the section out")

    @property
    def names(self) -> set[str]:
        """The objectives that count at some time."""
        return {name for part in (self.first, self.last) for name, weight in part.items() if weight}

    @property
    def first(self) -> Mapping[str, float]:
        """The weights at the beginning."""
        return self.objectives or {"kl": 1.0}

    @property
    def last(self) -> Mapping[str, float]:
        """The weights at the end."""
        return self.final_objectives or self.first

    @property
    def compares_states(self) -> bool:
        """Whether states after blocks are compared."""
        return bool(self.names & set(HIDDEN_OBJECTIVES))

    def weights(self, progress: float) -> dict[str, float]:
        """The weights of all objectives at a share of the run."""
        return {
            name: (1 - progress) * self.first.get(name, 0.0) + progress * self.last.get(name, 0.0)
            for name in sorted(self.names)
        }
