"""Learning from a teacher, as a Composer callback."""

from typing import cast

from composer.core import Callback, State
from composer.loggers import Logger

from llmprune.callbacks.loss_terms import LossTerms
from llmprune.models.causal_lm import ComposerCausalLM
from llmprune.models.loading import empty_model, load_model
from llmprune.models.number_formats import dtype_for_inference
from llmprune.models.objectives import LOCAL
from llmprune.models.sharded import fill, mesh_of, shard
from llmprune.models.stored_weights import StoredWeights
from llmprune.recovery.correspondence import Correspondence
from llmprune.recovery.distillation import DistillationConfig, Distilling
from llmprune.recovery.teachers import KeptPredictions, ModelTeacher
from llmprune.recovery.token_map import TokenMap
from llmprune.utils.errors import UserError


class Distillation(Callback):
    """Gives the model another objective: a teacher's predictions and hidden states.

    The teacher is not part of the Composer model, its state dict or its optimiser. It is loaded after the model has
    been sharded, and it is sharded over the same ranks.
    """

    def __init__(
        self,
        config: DistillationConfig,
        correspondence: Correspondence | None = None,
        tokens: TokenMap | None = None,
        *,
        attention: str = "sdpa",
        kept: bool = False,
    ) -> None:
        """Store the settings.

        Args:
            config: settings of the section.
            correspondence: pairs of model states and teacher states that are compared; None = no states.
            tokens: map of the model's tokens and the teacher's; None = both have the same vocabulary.
            attention: attention implementation of the teacher; see ``load_any_model``.
            kept: whether the data contain the teacher's predictions.

        Raises:
            UserError: a setting is out of range.
        """
        config.check()
        self.config, self._correspondence, self._attention, self._kept = config, correspondence, attention, kept
        self._tokens = tokens
        self._means = LossTerms("distillation")
        self.objective: Distilling

    def before_load(self, state: State, logger: Logger) -> None:
        """Load the teacher, and set the model's objective."""
        student = cast(ComposerCausalLM, getattr(state.model, "module", state.model))
        teacher = self._make_teacher(student, state)
        self.objective = Distilling(student, teacher, self.config.weights(0.0), self._correspondence)
        student.objective = self.objective

    def _make_teacher(self, student: ComposerCausalLM, state: State) -> ModelTeacher | KeptPredictions:
        config = self.config
        if self._kept:
            return KeptPredictions(top_k=config.top_k, temperature=config.temperature)
        alone = None
        if config.teacher is None:
            if student.ungated is None:
                raise UserError("name distillation.teacher: only a model with gates can learn from itself")
            model, alone = student.model, student.ungated
        else:
            mesh = mesh_of(student.parameters())
            dtype = dtype_for_inference(config.dtype, on_gpu=state.device.name == "gpu")
            if mesh is None:
                model = load_model(config.teacher, dtype=dtype, attention=self._attention)
                state.device.module_to_device(model)
            else:
                model = empty_model(config.teacher, dtype=dtype, attention=self._attention)
                shard(model, mesh)
                fill(model, StoredWeights(config.teacher))
            model.requires_grad_(False).eval()
            model.config.use_cache = False
        return ModelTeacher(
            model,
            blocks=() if self._correspondence is None else self._correspondence.needed(local=LOCAL in config.names),
            top_k=config.top_k,
            temperature=config.temperature,
            alone=alone,
            tokens=self._tokens,
        )

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Set the weights of the objectives for the current point of the run."""
        elapsed = state.get_elapsed_duration()
        self.objective.weights = self.config.weights(0.0 if elapsed is None else float(elapsed.value))

    def after_loss(self, state: State, logger: Logger) -> None:
        """Add the terms of the loss of a microbatch."""
        self._means.add(self.objective.terms, state.batch)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the mean of every term of the loss, and the objectives' weights."""
        self._means.log(logger)
        logger.log_metrics({f"distillation/weight/{name}": w for name, w in self.objective.weights.items()})
