"""The settings of evaluation during training."""

from dataclasses import dataclass, field

from llmprune.utils.settings import limited


@dataclass
class LiveEvaluationConfig:
    """Tasks and texts that are measured besides the losses, at every evaluation (``train.eval_interval``).

    Attributes:
        tasks: names of tasks or suites of lm-eval; tasks that generate text are not possible here.
        num_fewshot: number of examples in the prompt; null = each task's own.
        limit: number of questions of each task, or a share of them if below 1; null = all.
        include_path: folder with task files of your own; Python code that they name is executed.
        texts: files or prepared folders whose perplexity is measured, with a BOS before each segment.
        segment: number of tokens in a segment of the texts.
        batch_size: number of samples per forward pass on a rank.
    """

    tasks: list[str] = field(default_factory=list)
    num_fewshot: int | None = limited(None, least=0)
    limit: float | None = limited(None, above=0)
    include_path: str | None = None
    texts: list[str] = field(default_factory=list)
    segment: int = 128
    batch_size: int = limited(8, least=1)
