"""The settings of the whole way from a model to a smaller one."""

import re
from dataclasses import dataclass, field
from typing import Literal

from llmprune.pruning.budgets.settings import BudgetConfig
from llmprune.utils.errors import UserError
from llmprune.utils.settings import check_settings, limited

SELF = "self"  # the data are text that the source model writes
LEAST = 2048  # tokens of recovery: one batch
MINUTES = 30.0  # of recovery, unless the tokens or the minutes are given
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


@dataclass
class PruneConfig:
    """How a model is made smaller and recovered.

    Attributes:
        budget: limits on the cost of the smaller model.
        method: what is removed: blocks (depth), heads, channels and hidden dimensions (width), or both (half of the
            blocks that would go alone, and width for the rest; ``budget.depth_share`` changes the half); auto =
            whichever of these three has the lowest loss before recovery; gates = what learned gates close.
        data: text to prune and recover with: prepared data, or text, Markdown, JSON lines or Parquet (a file or a
            folder); self = text that the model writes itself; null = the built-in corpus, which is Python documentation
            and code.
        tokens: number of tokens of recovery, such as ``1M``; null = as many as ``minutes`` hold.
        minutes: minutes of recovery with its evaluations, by the speed of the first batches; null = 30, unless
            ``tokens`` is given.
        seq_len: number of tokens of a sample, unless the data are prepared already; null = 512, or as many as the model
            takes if these are fewer.
        text_field: name of the field of a JSON record that contains the text.
        prompts: file with prompts that every model continues: text, one a line, or JSON lines; null = three English
            sentences.
        seed: seed of the samples, of the order of the data and of the continuations.
    """

    budget: BudgetConfig = field(default_factory=BudgetConfig)
    method: Literal["auto", "depth", "width", "both", "gates"] = "auto"
    data: str | None = None
    tokens: str | None = None
    minutes: float | None = limited(None, above=0)
    seq_len: int | None = limited(None, least=8)
    text_field: str = "text"
    prompts: str | None = None
    seed: int = limited(17, least=0, most=2**32 - 1)

    def check(self) -> None:
        """Raise ``UserError`` for settings that are impossible for any model."""
        check_settings(self)
        budget = self.budget
        if budget.params is None and budget.memory is None and budget.latency is None:
            raise UserError("say how small the model shall be: --params 0.75, --memory 8GB or --latency 0.7")
        if self.method == "gates" and (budget.params is None or budget.memory or budget.latency):
            raise UserError("learned gates prune to a number of parameters: give --params alone, or another --method")
        if budget.depth_share is not None and self.method != "both":
            raise UserError("--depth-share divides a saving between blocks and width: it goes with --method both")
        if self.method == "gates" and budget.vocabulary is not None:
            raise UserError("learned gates do not take tokens: leave out --vocabulary, or choose another --method")
        if self.tokens is not None and self.minutes is not None:
            raise UserError("--tokens and --minutes both say how long recovery takes: give one")
        self.wanted_tokens()

    def wanted_tokens(self) -> int | None:
        """The number of tokens of recovery; None = as many as the minutes hold."""
        if self.tokens is None:
            return None
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMB]?)\s*", self.tokens, re.IGNORECASE)
        number = round(float(match[1]) * _COUNTS[match[2].upper()]) if match else 0
        if number < 1:
            raise UserError(f"--tokens '{self.tokens}' is no number of tokens: write 1M")
        if number < LEAST:
            raise UserError(
                f"--tokens {self.tokens} is less than a batch of {LEAST:,}: write {self.tokens}M for millions"
            )
        return number
