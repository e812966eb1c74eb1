"""The span of blocks that a run replaces: check that it fits, and find it if the settings name none."""

from collections.abc import Iterable

import torch
from composer.devices import Device
from composer.utils import dist
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmprune.models.causal_lm import Batch
from llmprune.models.families import family_of
from llmprune.models.parameters import parameters_after
from llmprune.models.stored_weights import StoredWeights, fingerprint
from llmprune.plans.plan import Plan
from llmprune.pruning.replacements.modules import REPLACEMENTS, Site
from llmprune.pruning.replacements.settings import BlockReplacementConfig
from llmprune.pruning.replacements.span import Span
from llmprune.pruning.scoring.criterion import ScoringJob
from llmprune.pruning.scoring.scorer import Scorer
from llmprune.utils.errors import UserError
from llmprune.utils.progress import Progress
from llmprune.utils.ranks import on_rank_zero


def source_fingerprint(source: str | None, model_config: PretrainedConfig) -> str | None:
    """The hash of the source model's weights, computed once, on rank 0; None = the weights are random."""
    return None if source is None else on_rank_zero(lambda: fingerprint(StoredWeights(source), model_config))


def check_plan(plan: Plan, file: str, source: str | None, model_config: PretrainedConfig) -> None:
    """Check that the plan whose span is replaced was made for the model.

    Args:
        plan: plan with the span.
        file: path of the plan's file, for messages.
        source: folder or name of the model whose weights are compared; None = they are not compared.
        model_config: Hugging Face config of the model.

    Raises:
        UserError: the plan was made for another model.
    """
    if not plan.source.agrees(family_of(model_config).shape(model_config)):
        raise UserError(f"{file} is for a model of another shape")
    if source is not None and plan.model != (found := source_fingerprint(source, model_config)):
        raise UserError(f"{file} was made for a model with the hash {plan.model}; {source} has {found}")


def check_replacement(settings: BlockReplacementConfig, model_config: PretrainedConfig, span: Span) -> None:
    """Check that the replacement module can be built, on the meta device (without memory).

    Raises:
        UserError: the module does not fit the model or the span.
    """
    span.check_within(family_of(model_config).shape(model_config).layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
        REPLACEMENTS[settings.kind](Site(model, span, 0), settings)
    parameters_after(model, span.end, settings.also)


@torch.no_grad()
def most_alike(model: PreTrainedModel, batches: Iterable[Batch], length: int, device: Device) -> Span:
    """The span of ``length`` blocks whose input and output have the highest mean cosine (arXiv:2403.19135).

    Args:
        model: source model, complete on every rank.
        batches: this rank's share of the samples.
        length: number of blocks of the span.
        device: device for the computation and for sums over ranks; the model is moved to it.
    """
    model = device.module_to_device(model)
    job = ScoringJob(model.config, next(model.parameters()).device)
    Span(0, length).check_within(job.layers)
    scorer = Scorer(model, ["cosine"], job, batch_size=1)
    for batch in Progress(batches, desc="finding the span", unit="batches"):
        scorer.update(batch["input_ids"].to(job.device))
    cosines = scorer.scores(_add_up)["spans"]["cosine"][str(length)]
    return Span(max(range(len(cosines)), key=lambda start: cosines[start]), length)


def _add_up(sums: torch.Tensor) -> None:
    if dist.get_world_size() > 1:
        dist.all_reduce(sums, reduce_operation="SUM")
