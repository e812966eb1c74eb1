"""The settings of evaluation beside training."""

from dataclasses import dataclass, field

from llmprune.utils.settings import limited


@dataclass
class LiveEvaluationConfig:
    """Tasks and texts measured beside the losses, at every evaluation (``train.eval_interval``).

    Attributes:
        tasks: of lm-eval, or suites; those that generate text are not possible here.
        num_fewshot: examples in the prompt; null = the tasks' own.
        limit: questions of each task, or a share below 1; null = all.
        include_path: folder with task files of your own; Python code that they name is run.
        texts: files or prepared folders to measure perplexity on, a BOS before each segment.
        segment: tokens of a segment.
        batch_size: samples per forward pass on a rank.
    """

    tasks: list[str] = field(default_factory=list)
    num_fewshot: int | None = limited(None, least=0)
    limit: float | None = limited(None, above=0)
    include_path: str | None = None
    texts: list[str] = field(default_factory=list)
    segment: int = 128
    batch_size: int = limited(8, least=1)
