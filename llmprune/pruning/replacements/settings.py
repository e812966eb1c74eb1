"""The settings of block replacement."""

from dataclasses import dataclass, field
from typing import Literal

from llmprune.models.objectives import HIDDEN_OBJECTIVES, OBJECTIVES
from llmprune.utils.errors import UserError
from llmprune.utils.settings import check_settings, limited


@dataclass
class StatesCacheConfig:
    """Hidden states at both ends of the span, kept on disk, so that later epochs compute no block of the source model.

    Attributes:
        samples: number of samples of the training stream that are kept; training repeats them.
        folder: folder that the states are written to; null = in the run folder.
    """

    samples: int = limited(1024, least=1)
    folder: str | None = None


@dataclass
class BlockReplacementConfig:
    """A small network that replaces a span of blocks and learns their output.

    Attributes:
        plan: path of a plan.json whose removed blocks are the span; null = the span is given by ``start`` and
            ``length``.
        start: number of the span's first block; null = of all spans of ``length`` blocks, the one with the most similar
            ends (cosine).
        length: number of blocks in the span.
        score_samples: number of training samples on which the span is chosen if ``start`` is null.
        kind: name of a registered replacement module: none, mean, linear, closed_form, ffn, swiglu or blocks.
        blocks: number of blocks in the replacement module of kind ``blocks``.
        take: initial weights of the kind ``blocks``: the first, last or spread blocks of the span, or random.
        intermediate: number of channels of the kinds ``ffn`` and ``swiglu``; null = four times the hidden size
            (``ffn``), or the model's own (``swiglu``).
        objectives: weights of the losses that are minimised: mse, cosine, lm, kl; empty = mse.
        top_k: number of the source model's likeliest tokens that the objective ``kl`` compares; null = all.
        temperature: divisor of the logits of both models in the objective ``kl``.
        also: weights that train besides the replacement module: output, final_norm, block.N after the span.
        fit_samples: number of training samples that mean, linear and closed_form are computed from, before any
            training.
        ridge: ridge of the fits of linear and closed_form, as a multiple of the mean square of their inputs; null = the
            one with the lowest error on the quarter of the samples that is not fitted on.
        force: keep the computed module even if it is no better than no module in the span's place.
        cache: cache of hidden states, only with the objectives ``mse`` and ``cosine``; null = none.
    """

    plan: str | None = None
    start: int | None = None
    length: int | None = limited(None, least=1)
    score_samples: int = limited(50, least=1)
    kind: str = "blocks"
    blocks: int = limited(1, least=1)
    take: Literal["first", "last", "spread", "random"] = "first"
    intermediate: int | None = limited(None, least=1)
    objectives: dict[str, float] = limited(make=dict, least=0)
    top_k: int | None = limited(None, least=1)
    temperature: float = limited(1.0, above=0)
    also: list[str] = field(default_factory=list)
    fit_samples: int = limited(256, least=2)
    ridge: float | None = limited(None, least=0)
    force: bool = False
    cache: StatesCacheConfig | None = None

    @property
    def weights(self) -> dict[str, float]:
        """The objectives whose weight is not zero."""
        return {name: weight for name, weight in (self.objectives or {"mse": 1.0}).items() if weight}

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return self.kind != "none" or bool(self.also)

    def check(self) -> None:
        """Raise ``UserError`` for settings that contradict each other, for any model."""
        check_settings(self, "block_replacement")
        if self.plan is None and self.length is None:
            raise UserError("block_replacement names no span: give plan, or length (and start)")
        if self.plan is not None and (self.start is not None or self.length is not None):
            raise UserError("block_replacement.plan names the span: leave out start and length")
        if unknown := sorted(set(self.objectives) - set(OBJECTIVES)):
            raise UserError(f"there is no objective '{unknown[0]}': choose from {', '.join(OBJECTIVES)}")
        if not self.weights:
            raise UserError("block_replacement.objectives need a positive weight: write {mse: 1.0}")
        if self.top_k is not None and "kl" not in self.weights:
            raise UserError("block_replacement.top_k belongs to the objective kl")
        if self.temperature != 1 and "kl" not in self.weights:
            raise UserError("block_replacement.temperature belongs to the objective kl")
        if self.also and "kl" in self.weights:
            raise UserError(
                "block_replacement.also changes weights that are the teacher's too: without the objective kl it can"
            )
        if self.also and "lm" not in self.weights:
            raise UserError("what block_replacement.also names learns from the objective lm alone: give it a weight")
        if self.cache is not None and (set(self.weights) - set(HIDDEN_OBJECTIVES)):
            raise UserError("block_replacement.cache holds the states that mse and cosine need: lm and kl need more")
        if self.cache is not None and self.kind in ("none", "closed_form"):
            raise UserError(f"{self.kind} does not learn from what block_replacement.cache holds: leave the cache out")
