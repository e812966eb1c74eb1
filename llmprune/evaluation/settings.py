"""The settings of evaluation: of models by a command, and of a model during its training."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llmprune.utils.errors import UserError
from llmprune.utils.settings import check_settings, limited

LONGEST_SEGMENT = 2048  # tokens of a segment by default, in models that take more

BosMode = Literal["none", "once", "each"]


@dataclass(frozen=True)
class PerplexityConfig:
    """Settings for the measurement of perplexity.

    Attributes:
        segment: number of tokens of a segment, without a BOS of its own; null = as many as all models take, at most
            2,048 (like shortened: 128). The last segment, which may be shorter, counts too (like shortened: it does
            not).
        stride: number of tokens from the start of one segment to the start of the next; null = ``segment``.
        bos: where a BOS is put: ``once`` (before the text), ``each`` (before every segment, which then has one token
            more), ``none``, or several, each measured on its own; null = what the tokenizer does with a text, once or
            none (like shortened: once and each).
        tokens: number of tokens at the start of each text, and of each domain of prepared data, that are measured; null
            = all.
        samples_per_domain: largest number of samples of each domain of prepared data; null = all.
        text_field: name of the field of a JSON record that contains the text.
        like: measure as the code of a paper does: ``shortened`` (Shortened LLaMA) joins records, which are the lines of
            a text file, by blank lines, and leaves out the rest after the last whole segment; null = a text file is
            read as it is, with an EOS between records.
    """

    segment: int | None = limited(None, least=2)
    stride: int | None = limited(None, least=1)
    bos: Sequence[BosMode] | None = None
    tokens: int | None = limited(None, least=2)
    samples_per_domain: int | None = limited(None, least=1)
    text_field: str = "text"
    like: Literal["shortened"] | None = None

    def check(self) -> None:
        """Raise ``UserError`` for values that are out of range or contradict each other."""
        check_settings(self)
        if self.bos is not None and not self.bos:
            raise UserError("bos names no mode: name none, once, each, or several of them")
        if self.stride is not None and self.segment is not None and self.stride > self.segment:
            raise UserError(f"the stride must be at most the segment's {self.segment:,} tokens; got {self.stride:,}")


@dataclass(frozen=True)
class TasksConfig:
    """The tasks to run, and the number of questions and examples.

    Attributes:
        names: tasks of lm-eval, or suites: commonsense7, reassessing8, streamline7, sheared.
        num_fewshot: number of examples in the prompt, instead of those of the suites and the tasks; null = theirs.
        limit: largest number of questions per task, or a share of them if below 1; null = all.
        include_path: folder with task files of your own (YAML); their data may be local, and Python code that they name
            is run.
    """

    names: Sequence[str] = ()
    num_fewshot: int | None = limited(None, least=0)
    limit: float | None = limited(None, above=0)
    include_path: str | None = None

    def check(self) -> None:
        """Raise ``UserError`` for values that are out of range."""
        check_settings(self)
        if self.limit is not None and self.limit > 1 and self.limit % 1:
            raise UserError(f"limit is {self.limit}; it must be a positive whole number or a share below 1")


@dataclass(frozen=True)
class GenerationConfig:
    """Settings for the generation of continuations.

    Attributes:
        max_new_tokens: largest number of tokens of a continuation.
        temperature: divisor of the logits before sampling; 0 = always the most probable token.
        top_p: share of the probability; tokens are sampled from the smallest set of most probable tokens that has it.
        top_k: number of most probable tokens that are sampled from; 0 = all.
        per_prompt: number of continuations per prompt.
        seed: seed of the sampling.
        batch_size: number of prompts per forward pass.
    """

    max_new_tokens: int = limited(64, least=1)
    temperature: float = limited(0.6, least=0)
    top_p: float = limited(0.9, above=0, most=1)
    top_k: int = limited(0, least=0)
    per_prompt: int = limited(1, least=1)
    seed: int = limited(17, least=0, most=2**32 - 1)
    batch_size: int = limited(8, least=1)

    def check(self) -> None:
        """Raise ``UserError`` for values that are out of range or contradict each other."""
        check_settings(self)
        if 0 < self.temperature < 0.01:
            raise UserError(f"temperature is {self.temperature}; it must be 0 or at least 0.01")
        if self.per_prompt > 1 and self.temperature == 0:
            raise UserError("several continuations of a prompt would all be the same: set a temperature above 0")

    @property
    def settings(self) -> dict[str, Any]:
        """Generation settings for Transformers; see ``LoadedModel.generation``."""
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {
            "max_new_tokens": self.max_new_tokens,
            "num_return_sequences": self.per_prompt,
            **(sampling if self.temperature else {"do_sample": False}),
        }


@dataclass(frozen=True)
class EvaluationConfig:
    """Settings for the evaluation of models.

    Attributes:
        texts: files and folders for perplexity: text, Markdown, JSON lines or prepared data.
        perplexity: settings of perplexity.
        tasks: settings of tasks.
        prompts: file of prompts with references, for scoring continuations; null = no continuations.
        prompt_share: share of each text that is its prompt, the rest is its reference; null = no division.
        generation: settings for the generation of continuations.
        batch_size: number of samples per forward pass, or ``auto``, the largest number that fits into memory.
    """

    texts: Sequence[str] = ()
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    prompts: str | None = None
    prompt_share: float | None = limited(None, above=0, below=1)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    batch_size: int | Literal["auto"] = limited(8, least=1)

    def check(self) -> None:
        """Raise ``UserError`` for values that are out of range or contradict each other."""
        check_settings(self)
        for part in (self.perplexity, self.tasks, self.generation):
            part.check()


@dataclass
class LiveEvaluationConfig:
    """Tasks and texts that are measured besides the losses, at every evaluation (``train.eval_interval``).

    Attributes:
        tasks: names of tasks or suites of lm-eval; tasks that generate text are not possible here.
        num_fewshot: number of examples in the prompt; null = each task's own.
        limit: number of questions of each task, or a share of them if below 1; null = all.
        include_path: folder with task files of your own; Python code that they name is executed.
        texts: files or prepared folders whose perplexity is measured, with a BOS before the text if the tokenizer puts
            one there.
        segment: number of tokens in a segment of the texts; null = as many as the model takes, at most 2,048.
        batch_size: number of samples per forward pass on a rank.
    """

    tasks: list[str] = field(default_factory=list)
    num_fewshot: int | None = limited(None, least=0)
    limit: float | None = limited(None, above=0)
    include_path: str | None = None
    texts: list[str] = field(default_factory=list)
    segment: int | None = limited(None, least=2)
    batch_size: int = limited(8, least=1)
