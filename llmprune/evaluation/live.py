"""Evaluation of a model on tasks and texts during training, with work divided among the ranks."""

import logging
from collections.abc import Callable

import torch
from composer.utils import dist
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmprune.evaluation.perplexity import check_streams, measure_perplexity, read_streams, segmentations
from llmprune.evaluation.settings import LiveEvaluationConfig, PerplexityConfig, TasksConfig
from llmprune.evaluation.tasks import EvaluatedModel, Tasks, quiet
from llmprune.models.loaded import bos_of
from llmprune.utils.errors import UserError
from llmprune.utils.settings import check_settings

log = logging.getLogger(__name__)

Forward = Callable[[dict[str, Tensor]], Tensor]


class LiveModel(EvaluatedModel):
    """A model in training, as a model of lm-eval; every rank computes its share of the questions.

    All ranks run the same number of forward passes, because the ranks of a sharded model wait for each other: lm-eval
    gives all ranks equally many requests, and its cache of logits, which would save different numbers of passes, is
    off.
    """

    def __init__(
        self, model: PreTrainedModel, forward: Forward, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> None:
        """Wrap a model; ``forward`` computes its logits through the modules that shard or wrap it."""
        super().__init__(model, tokenizer=tokenizer, batch_size=batch_size, backend="causal", logits_cache=False)
        self._forward = forward
        self._rank, self._world_size = dist.get_global_rank(), dist.get_world_size()

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return self._forward({"input_ids": inps})

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the tensors of all ranks."""
        return torch.cat([part.reshape(-1).cpu() for part in dist.all_gather(tensor.to(self.device))])

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()


class LiveEvaluation:
    """Evaluates models in training on tasks and texts."""

    def __init__(
        self, config: LiveEvaluationConfig, model: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Load tasks and texts for models with this config.

        Raises:
            UserError: a task is unknown, its data are not available, or a text can't be read.
        """
        self._config, self._tokenizer = config, tokenizer
        if not (config.tasks or config.texts):
            raise UserError("evaluation names neither tasks nor texts")
        check_settings(config, "evaluation")
        perplexity = PerplexityConfig(config.segment)
        (self._segmentation,) = segmentations(perplexity, [(model, tokenizer)])
        tasks = TasksConfig(config.tasks, config.num_fewshot, config.limit, config.include_path)
        self._tasks = Tasks(tasks, generate=False) if config.tasks else None
        self._texts = read_streams(config.texts, tokenizer, perplexity)
        check_streams(self._texts, self._segmentation, model, bos_of(tokenizer))

    def measure(self, model: PreTrainedModel, forward: Forward) -> dict[str, float]:
        """Measure metrics, by name: ``tasks/TASK/METRIC`` (on rank 0 only) and ``perplexity/TEXT``.

        Args:
            model: unwrapped model.
            forward: function from a batch to logits, through the modules that shard or change the model; all ranks call
                it together.
        """
        found: dict[str, float] = {}
        size = self._config.batch_size
        (mode,) = self._segmentation.bos
        for name, tokens in self._texts.items():
            measured = measure_perplexity(
                model,
                tokens,
                self._segmentation,
                mode,
                bos=bos_of(self._tokenizer),
                batch_size=size,
                forward=lambda inputs: forward({"input_ids": inputs}),
            )
            found[f"perplexity/{name}"] = measured.value
            if dist.get_global_rank() == 0:
                log.info("%s: perplexity %.4f", name, measured.value)
        if self._tasks is not None:
            with quiet():
                live = LiveModel(model, forward, self._tokenizer, size)
            results = self._tasks.run(live)
            for task, metrics in ({} if results is None else results.tasks).items():
                found |= {
                    f"tasks/{task}/{metric}": float(value)
                    for metric, value in metrics.items()
                    if metric != "num_fewshot"
                }
            if results is not None:
                found |= {f"tasks/{suite}/average": value for suite, value in results.averages.items()}
        return found
