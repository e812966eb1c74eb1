"""The job that scores a model, by Composer's trainer or block by block from disk, and makes plans from the scores."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import DataSpec, Evaluator
from composer.utils import dist, get_device
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PretrainedConfig

from llmprune.callbacks.layer_scoring import CALIBRATION, LayerScoring
from llmprune.checkpoints.run_folder import RunFolder
from llmprune.config.job_files import save_config
from llmprune.config.schema import ScoringConfig
from llmprune.data.calibration import calibration_samples, check_calibration, samples_fingerprint, with_length
from llmprune.models.autocast import compute_in
from llmprune.models.causal_lm import ComposerCausalLM
from llmprune.models.enough_memory import check_memory
from llmprune.models.families import family_of
from llmprune.models.loaded import check_vocabulary
from llmprune.models.loading import load_model, load_model_config, load_tokenizer
from llmprune.models.number_formats import weights_and_products
from llmprune.models.offloading import OffloadedModel
from llmprune.models.placement import TRAINABLE, Placement
from llmprune.models.source import Model, find_folder, longest_input
from llmprune.models.stored_weights import StoredWeights, fingerprint
from llmprune.pruning.planning import make_plan, rehearse
from llmprune.pruning.scoring.pictures import draw_scores
from llmprune.pruning.scoring.scorer import Scorer, block_passes
from llmprune.pruning.scoring.scores import Scores
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.utils.errors import UserError
from llmprune.utils.outputs import clear, refuse_replacing
from llmprune.utils.progress import Progress
from llmprune.utils.ranks import init_distributed, on_rank_zero, share_cores

log = logging.getLogger(__name__)

AUTO = Placement()


def score(
    model: str,
    config: LayerScoringConfig,
    placement: Placement = AUTO,
    *,
    tokenizer: str | None = None,
    offload: bool = False,
) -> Scores:
    """Score a model's blocks.

    Args:
        model: folder or hub name of the model.
        config: criteria and calibration samples.
        placement: device and number format of the model: one device, no adapter; see ``weights_and_products``.
        tokenizer: folder or hub name of the tokenizer; None = the model's tokenizer.
        offload: keep only one block (and the next) in memory; without criteria that need gradients.

    Raises:
        UserError: the model or the samples can't be read, or a criterion is impossible here.
    """
    placement.check(TRAINABLE)
    if placement.device_map is not None or placement.adapter is not None:
        raise UserError("scoring takes neither a device map nor an adapter")
    source = find_folder(model)
    model_config = load_model_config(source)
    names = config.names(model_config, gradients=not offload)
    config = replace(config, data=with_length(config.data, longest_input(model_config)))
    family = family_of(model_config)
    shape = family.shape(model_config)
    tokens = _samples(tokenizer or source, model_config, config, names)
    if not offload:
        check_memory(
            source,
            dtype=weights_and_products(placement.dtype, on_gpu=placement.on_gpu)[0],
            on_gpu=placement.on_gpu,
            remedy="hold one block at a time with --offload, or take bfloat16",
        )
    scored = _offloaded if offload else _by_trainer
    sections, perplexity = scored(source, placement, config, names, tokens)
    scores = Scores(
        model=_settled(model),
        family=family.name,
        fingerprint=fingerprint(StoredWeights(source), model_config),
        source=shape,
        data={} if tokens is None else asdict(config.data) | {"path": str(Path(config.data.path or "").resolve())},
        settings=_recorded(config)
        | {
            "dtype": placement.dtype,
            "tokenizer": None if tokenizer is None else _settled(tokenizer),
            "samples": None if tokens is None else samples_fingerprint(tokens),
        },
        perplexity=perplexity,
        **sections,
    )
    scores.check_finite()
    return scores


def _recorded(config: LayerScoringConfig) -> dict[str, Any]:
    """The settings that decide scores, as scores.json keeps them."""
    return {name: value for name, value in asdict(config).items() if name not in ("data", "criteria")}


def save_scores(scores: Scores, out: Path | str) -> list[Path]:
    """Write scores as JSON, and their pictures into the same folder; returns the paths of the files."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures = draw_scores(scores, out.parent, out.stem)
    scores.save(out)  # last: a job that was stopped before it scores again
    return [out, *pictures]


def _settled(model: str) -> str:
    """The absolute path of a folder; a hub name is returned unchanged."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _samples(
    tokenizer: Model, model_config: PretrainedConfig, config: LayerScoringConfig, names: list[str]
) -> Tensor | None:
    """The calibration samples, int64 [samples, length]; None if no criterion reads samples."""
    from llmprune.pruning.scoring.all_criteria import CRITERIA

    if all(CRITERIA[name].reads in (None, "weights") for name in names):
        return None
    check_calibration(config.data, longest_input(model_config))
    samples = calibration_samples(config.data, load_tokenizer(tokenizer))
    check_vocabulary(int(samples.max()), model_config, "the calibration text")
    for name in names:
        CRITERIA[name].check_samples(*samples.shape)
    return samples


def _by_trainer(
    model: Model, placement: Placement, config: LayerScoringConfig, names: list[str], tokens: Tensor | None
) -> tuple[dict[str, dict[str, Any]], float | None]:
    """Score with the complete model in memory; every rank reads its share of the samples."""
    init_distributed(placement.device)
    weights, products = weights_and_products(placement.dtype, on_gpu=placement.on_gpu)
    _log_formats(weights, products)
    loaded = compute_in(load_model(model, dtype=weights, attention=placement.attention), products)
    ranks, rank = dist.get_world_size(), dist.get_global_rank()
    if tokens is not None and len(tokens) < ranks:
        raise UserError(f"{len(tokens)} calibration samples are too few for {ranks} ranks")
    if tokens is None:
        tokens = torch.zeros(ranks, 8, dtype=torch.int64)
    batches = share(tokens, rank, ranks, config.batch_size)
    loader = DataLoader(_Share(batches), batch_size=None)
    data = DataSpec(loader, split_batch=lambda batch, size: [batch])  # batches already have the final size
    progress = _progress(sum(map(len, batches)), names, family_of(loaded.config).shape(loaded.config).layers)
    with (
        progress,
        warnings.catch_warnings(),
        redirect_stdout(sys.stderr),
    ):  # standard output is for the command's result
        warnings.simplefilter("ignore")
        callback = LayerScoring(config, progress.update)
        trainer = Trainer(
            model=ComposerCausalLM(loaded, products=products),
            device=placement.device,
            precision="fp32",
            eval_dataloader=Evaluator(label=CALIBRATION, dataloader=data),
            callbacks=[callback],
            progress_bar=False,
        )
        trainer.eval()
        trainer.close()
    return {name: dict(values) for name, values in callback.scores.items()}, callback.perplexity


def _offloaded(
    model: Model, placement: Placement, config: LayerScoringConfig, names: list[str], tokens: Tensor | None
) -> tuple[dict[str, dict[str, Any]], float | None]:
    """Score block by block: all samples pass through a block before the next block is read."""
    device = get_device(placement.device)._device
    weights, products = weights_and_products(placement.dtype, on_gpu=device.type == "cuda")
    _log_formats(weights, products)
    offloaded = OffloadedModel(model, dtype=weights, device=device, attention=placement.attention)
    compute_in(offloaded.model, products)
    job = config.job(offloaded.model.config, device)
    with _progress(0 if tokens is None else len(tokens), names, job.layers) as progress:
        scorer = Scorer(
            offloaded.model,
            names,
            job,
            batch_size=config.batch_size,
            loaded=offloaded.loaded,
            told=progress.update,
        )
        if tokens is not None:
            scorer.update(tokens.to(device))
        return scorer.scores(), scorer.perplexity()


def _log_formats(weights: torch.dtype, products: torch.dtype | None) -> None:
    log.info("weights in %s, matrix products in %s", weights, products or weights)


def _progress(samples: int, names: list[str], layers: int) -> Progress:
    """The progress of scoring some samples."""
    return Progress(desc="scoring", total=samples * block_passes(names, layers), unit="block passes")


def share(tokens: Tensor, rank: int, ranks: int, batch_size: int) -> list[Tensor]:
    """A rank's samples in batches; every rank has the same number, because Composer stops all ranks at the first end.

    Args:
        tokens: all samples, [samples, length]; at least one for each rank.
        rank: number of the rank that reads the batches.
        ranks: number of ranks.
        batch_size: samples per batch (one more where the ranks' shares differ).
    """
    own, least = tokens[rank::ranks], len(tokens) // ranks
    most = -(-len(tokens) // ranks)
    return list(own.tensor_split(min(-(-most // batch_size), least)))


class _Share(IterableDataset[dict[str, Tensor]]):
    """The batches of one rank."""

    def __init__(self, batches: list[Tensor]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self._batches:
            yield {"input_ids": batch}


def run_scoring(config: ScoringConfig) -> Scores:
    """Run the job: write ``scores.json``, its pictures, and one plan per configured number into the folder.

    Raises:
        UserError: a setting does not fit, or the folder is not empty.
    """
    if config.plan is not None:
        model_config = load_model_config(config.model.path)
        names = config.layer_scoring.names(model_config)
        for plan in config.plan.each().values():
            rehearse(plan, names, model_config, config.layer_scoring.data)
    share_cores()
    init_distributed(config.model.device)
    run, model = RunFolder(Path(config.run.folder)), config.model
    with run.claimed():
        on_rank_zero(lambda: run.find(overwrite=config.run.overwrite, autoresume=False))
        inputs = (model.path, model.tokenizer, config.layer_scoring.data.path)
        refuse_replacing(run.path, [path for path in inputs if path and "://" not in path])
        placement = Placement(model.dtype, model.device, attention=model.attention)
        scores = score(model.path, config.layer_scoring, placement, tokenizer=model.tokenizer)
        on_rank_zero(lambda: _write(config, scores, run.path))
    return scores


def _write(config: ScoringConfig, scores: Scores, folder: Path) -> None:
    plans = {} if config.plan is None else config.plan.each()
    clear(folder)
    save_config(config, folder / "config.yaml")
    save_scores(scores, folder / "scores.json")
    for name, plan in plans.items():  # scores took hours, so they are written first: a plan may fail
        make_plan(scores, plan).save(folder / name)
    names = ["scores.json", *plans]
    print(f"{folder}: {', '.join(names)}")
