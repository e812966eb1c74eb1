"""Everything about a run of block replacement that comes before it: the span, the cache, the callback."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from composer.core import Time
from composer.devices import Device
from composer.utils import dist
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmprune.callbacks.block_replacement import BlockReplacement
from llmprune.checkpoints.run_folder import Manifest, RunFolder
from llmprune.config.schema import Config
from llmprune.data.prepared import PreparedData
from llmprune.models.causal_lm import Batch
from llmprune.models.families import family_of
from llmprune.models.parameters import parameters_behind
from llmprune.models.stored_weights import StoredWeights, fingerprint
from llmprune.plans.plan import Plan
from llmprune.pruning.replacements.cache import StatesCache
from llmprune.pruning.replacements.modules import STAND_INS, Site
from llmprune.pruning.replacements.settings import BlockReplacementConfig, StatesCacheConfig
from llmprune.pruning.replacements.span import Span, given_span
from llmprune.pruning.scoring.criterion import ScoringJob
from llmprune.pruning.scoring.scorer import Scorer
from llmprune.training.loaders import first_batches
from llmprune.utils.errors import UserError
from llmprune.utils.ranks import on_rank_zero


def known_span(config: Config, model_config: PretrainedConfig, run: RunFolder, resume: Path | None) -> Span | None:
    """The span that the settings name, or that a run which goes on has found; None = it is to be scored.

    Raises:
        UserError: the plan is for other weights (they are read once, on one rank).
    """
    settings, source = config.block_replacement, config.model.path
    assert settings is not None
    span = given_span(settings)
    if settings.plan is not None and Plan.load(settings.plan).source != family_of(model_config).shape(model_config):
        raise UserError(f"{settings.plan} is for a model of another shape")
    if span is None and resume is not None and (saved := Manifest.load(run.checkpoints).block_replacement):
        return Span(saved["start"], settings.length or saved["length"])  # another length is refused later
    if settings.plan is not None and source is not None and resume is None:
        found = on_rank_zero(lambda: fingerprint(StoredWeights(source), model_config))
        if (wanted := Plan.load(settings.plan).model) != found:
            raise UserError(f"{settings.plan} was made for a model with the hash {wanted}; {source} has {found}")
    return span


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
def most_alike(model: PreTrainedModel, batches: Iterable[Batch], length: int, device: Device) -> Span:
    """The span of ``length`` blocks whose input and output have the highest mean cosine (arXiv:2403.19135).

    Args:
        model: the source, whole on every rank.
        batches: this rank's share of the samples.
        length: blocks of the span.
        device: where the job computes and its ranks add up; the model is moved there.
    """
    model = device.module_to_device(model)
    job = ScoringJob(model.config, next(model.parameters()).device)
    Span(0, length).check(job.layers)
    scorer = Scorer(model, ["cosine"], job, batch_size=1)
    for batch in batches:
        scorer.update(batch["input_ids"].to(job.device))
    cosines = scorer.scores(_add_up)["spans"]["cosine"][str(length)]
    return Span(max(range(len(cosines)), key=lambda start: cosines[start]), length)


def make_replacement(
    config: Config,
    settings: BlockReplacementConfig,
    data: PreparedData,
    run: RunFolder,
    span: Span,
    cache: StatesCache | None,
) -> BlockReplacement:
    """The callback that replaces blocks."""
    return BlockReplacement(
        settings,
        span,
        seed=config.run.seed,
        folder=run.checkpoints,
        fit_on=first_batches(config, data, settings.fit_samples),
        alone=Time.from_timestring(config.train.duration).value == 0,
        cache=cache,
        cached=() if cache is None else first_batches(config, data, cache.samples, of_machine=True),
    )


def make_cache(
    config: Config,
    settings: StatesCacheConfig,
    model_config: PretrainedConfig,
    data: PreparedData,
    run: RunFolder,
    span: Span,
) -> StatesCache:
    """The states that are trained on; their size is known before anything is computed.

    Raises:
        UserError: they can't be kept there.
    """
    shape = family_of(model_config).shape(model_config)
    manifest, source = data.manifest, config.model.path
    weights = None if source is None else on_rank_zero(lambda: fingerprint(StoredWeights(source), model_config))
    identity = {
        "model": weights,
        "span": asdict(span),
        "data": manifest.fingerprint(),
        "weights": config.data.weights,
        "boundaries": config.data.document_boundaries,
        "seed": config.run.seed,
        "dtype": config.model.dtype,
    }
    folder = Path(settings.folder) if settings.folder is not None else run.path / "states"
    cache = StatesCache(folder, settings.samples, manifest.sequence_length, shape.hidden, identity)
    cache.check()
    return cache


def _add_up(sums: torch.Tensor) -> None:
    if dist.get_world_size() > 1:
        dist.all_reduce(sums, reduce_operation="SUM")
