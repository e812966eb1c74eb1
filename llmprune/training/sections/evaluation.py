"""``evaluation``: tasks and texts measured beside the losses."""

from collections.abc import Iterable

from composer import Callback

from llmprune.callbacks.evaluation import Evaluation
from llmprune.config.section_registry import SECTIONS
from llmprune.evaluation.settings import LiveEvaluationConfig
from llmprune.training.section import Build, Section


@SECTIONS.register("evaluation")
class EvaluationSection(Section[LiveEvaluationConfig]):
    """Tasks and texts measured beside the losses, at every evaluation."""

    name = "evaluation"
    settings = LiveEvaluationConfig

    def begin(self, build: Build) -> None:
        """Load tasks and texts, before the model is loaded."""
        from llmprune.evaluation.live import LiveEvaluation  # lm-eval takes seconds to import

        self._live = LiveEvaluation(self.own, build.inputs.model_config, build.inputs.tokenizer)

    def callbacks(self, build: Build) -> Iterable[Callback]:
        """The callback ``Evaluation``."""
        return [Evaluation(self._live.measure)]
