"""Which span of a model is replaced, before a run begins."""

from collections.abc import Iterable
from pathlib import Path

import torch
from composer.utils import dist
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmprune.config import Config
from llmprune.errors import UserError
from llmprune.families import family_of
from llmprune.models.causal_lm import Batch
from llmprune.models.loading import StoredWeights, fingerprint
from llmprune.models.parts import parameters_behind
from llmprune.plans import Plan
from llmprune.ranks import on_rank_zero
from llmprune.replacements.settings import BlockReplacementConfig
from llmprune.replacements.span import Span, span_of
from llmprune.replacements.stand_ins import STAND_INS, Site
from llmprune.run_folder import Manifest, RunFolder
from llmprune.scoring.criterion import ScoringJob
from llmprune.scoring.scorer import Scorer


def known_span(config: Config, model_config: PretrainedConfig, run: RunFolder, resume: Path | None) -> Span | None:
    """The span that the settings name, or that a run which goes on has found; None = it is to be scored.

    Raises:
        UserError: the plan is for other weights (they are read once, on one rank).
    """
    settings, source = config.block_replacement, config.model.path
    assert settings is not None
    span = given_span(config)
    if span is None and resume is not None and (saved := Manifest.load(run.checkpoints).block_replacement):
        return Span(saved["start"], saved["length"])
    if settings.plan is not None and source is not None and resume is None:
        found = on_rank_zero(lambda: fingerprint(StoredWeights(source), model_config))
        if (wanted := Plan.load(settings.plan).model) != found:
            raise UserError(f"{settings.plan} was made for a model with the hash {wanted}; {source} has {found}")
    return span


def given_span(config: Config) -> Span | None:
    """The span that the settings name; None = it is to be scored.

    Raises:
        UserError: the plan is another model's, or does something else than to remove a span.
    """
    settings = config.block_replacement
    assert settings is not None
    if settings.plan is None:
        assert settings.length is not None
        return None if settings.start is None else Span(settings.start, settings.length)
    return span_of(Plan.load(settings.plan))


def check_replacement(settings: BlockReplacementConfig, model_config: PretrainedConfig, span: Span) -> None:
    """Build the stand-in without memory.

    Raises:
        UserError: it does not fit the model or the span.
    """
    span.check(family_of(model_config).shape(model_config).layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
        STAND_INS.get(settings.kind)(Site(model, span, 0), settings)
    parameters_behind(model, span.end, settings.also)


@torch.no_grad()
def most_alike(model: PreTrainedModel, batches: Iterable[Batch], length: int) -> Span:
    """The span of ``length`` blocks whose input and output have the highest mean cosine (arXiv:2403.19135).

    Args:
        model: the source, whole on every rank.
        batches: this rank's share of the samples.
        length: blocks of the span.
    """
    layers = family_of(model.config).shape(model.config).layers
    Span(0, length).check(layers)
    device = next(model.parameters()).device
    scorer = Scorer(model, ["cosine"], ScoringJob(layers=layers, device=device), batch_size=1)
    for batch in batches:
        scorer.update(batch["input_ids"].to(device))
    cosines = scorer.scores(_add_up)["spans"]["cosine"][str(length)]
    return Span(max(range(len(cosines)), key=lambda start: cosines[start]), length)


def _add_up(sums: torch.Tensor) -> None:
    if dist.get_world_size() > 1:
        dist.all_reduce(sums, reduce_operation="SUM")
