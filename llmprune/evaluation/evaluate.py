"""The quality of one or several models: perplexity, tasks, continuations."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import find_executable_batch_size
from torch import Tensor

from llmprune.data.sources import clean_name
from llmprune.evaluation.continuations import (
    Prompt,
    continuation_scores,
    encode_prompts,
    read_prompts,
    save_continuations,
    write_continuations,
)
from llmprune.evaluation.perplexity import (
    Perplexity,
    Segmentation,
    check_streams,
    measure_perplexity,
    read_streams,
    segmentations,
)
from llmprune.evaluation.settings import BosMode, EvaluationConfig
from llmprune.evaluation.tasks import Tasks, language_model, save_samples
from llmprune.models.loaded import LoadedModel, ModelSource, bos_of, find_model
from llmprune.models.placement import Placement
from llmprune.utils.errors import UserError
from llmprune.utils.outputs import mark, output_folder, refuse_existing, remove
from llmprune.utils.progress import Progress

log = logging.getLogger(__name__)

SCHEMA = 1
LARGEST_BATCH = 64  # first batch size that ``auto`` tries
T = TypeVar("T")


def evaluate(
    models: Sequence[str],
    config: EvaluationConfig,
    placement: Placement,
    samples: Path | None = None,
    *,
    overwrite: bool = False,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Evaluate models one after the other.

    Args:
        models: folders or hub names of the models.
        config: settings of the evaluation.
        placement: device and dtype of the models.
        samples: folder to write logs of every question and every continuation to; None = no logs.
        overwrite: whether ``samples`` may be replaced.
        keep: function that is called with all results so far after every model, so that a later error loses nothing.

    Returns:
        The contents of results.json.

    Raises:
        UserError: a setting is impossible; most of these errors are found before any model is opened.
    """
    if not (config.texts or config.tasks.names or config.prompts):
        raise UserError("say what to evaluate: --perplexity FILE, --tasks NAMES, --prompts FILE or --generated FILE")
    _check(models, config)
    found = [find_model(name, placement) for name in models]
    cuts = segmentations(config.perplexity, [(one.config, one.tokenizer) for one in found])
    work = [_prepare(one, config, cut) for one, cut in zip(found, cuts, strict=True)]
    tasks = Tasks(config.tasks) if config.tasks.names else None
    logged = samples is not None and bool(config.tasks.names or config.prompts)
    if samples is not None:
        refuse_existing(samples, overwrite)
        remove(samples)
    if samples is not None and logged:
        samples.mkdir(parents=True)
        mark(samples)
    results: dict[str, Any] = {"schema": SCHEMA, "models": {}}
    for each in Progress(work, desc="evaluation", unit="models", disable=len(work) < 2):
        name = each.found.name
        with output_folder(samples / clean_name(name.strip("/"))) if samples and logged else nullcontext() as logs:
            results["models"][name] = _evaluate_model(each, config, tasks, logs)
        if keep is not None:
            keep(results)
    return results


@dataclass(frozen=True)
class _Work:
    """A model, and the texts, their segments, and the prompts for its evaluation."""

    found: ModelSource
    streams: dict[str, Tensor]
    segmentation: Segmentation
    prompts: list[Prompt]


def _prepare(found: ModelSource, config: EvaluationConfig, segmentation: Segmentation) -> _Work:
    """Read texts and prompts, and check that the model can read them."""
    try:
        streams = read_streams(config.texts, found.tokenizer, config.perplexity)
        if streams:
            check_streams(streams, segmentation, found.config, bos_of(found.tokenizer))
        prompts = [] if config.prompts is None else read_prompts(config.prompts, config.prompt_share)
        encode_prompts(prompts, found.tokenizer, config.generation.max_new_tokens, found.config)
    except UserError as error:
        raise UserError(f"{found.name}: {error}") from None
    if prompts and not any(prompt.reference for prompt in prompts):
        raise UserError(f"{config.prompts} has no references to score against: `llmprune generate` needs none")
    return _Work(found, streams, segmentation, prompts)


def _evaluate_model(work: _Work, config: EvaluationConfig, tasks: Tasks | None, logs: Path | None) -> dict[str, Any]:
    loaded = work.found.open()
    log.info("evaluating %s: %s parameters", work.found.name, f"{loaded.parameters:,}")
    found: dict[str, Any] = {"parameters": loaded.parameters}
    if work.streams:
        found["perplexity"] = {name: _perplexity(loaded, name, work, config) for name in work.streams}
    if tasks is not None:
        ran = tasks.run(language_model(loaded.model, loaded.tokenizer, batch_size=config.batch_size))
        assert ran is not None  # there is one rank
        found |= {"tasks": ran.tasks, "averages": ran.averages}
        if logs is not None:
            save_samples(ran.samples, logs)
    if config.prompts is not None:
        log.info("writing continuations of %d prompts", len(work.prompts))
        records = _with_batch_size(
            config, lambda size: write_continuations(loaded, work.prompts, replace(config.generation, batch_size=size))
        )
        found["continuations"] = {Path(config.prompts).stem: continuation_scores(records)}
        if logs is not None:
            save_continuations(records, logs / "continuations.jsonl")
    return found


def _perplexity(loaded: LoadedModel, name: str, work: _Work, config: EvaluationConfig) -> dict[str, Any]:
    """The perplexity of the stream ``name`` in every mode, and the settings that it depends on."""
    segmentation = work.segmentation
    entry: dict[str, Any] = {
        "segment": segmentation.length,
        "stride": segmentation.stride,
        "perplexity_tokens": config.perplexity.tokens,
        "like": config.perplexity.like,
        "tokens": {},
        "bits_per_byte": {},
    }
    for mode in segmentation.bos:

        def measure(batch_size: int, mode: BosMode = mode) -> Perplexity:
            return measure_perplexity(
                loaded.model,
                work.streams[name],
                segmentation,
                mode,
                bos=bos_of(loaded.tokenizer),
                batch_size=batch_size,
                progress=f"perplexity of {name}, BOS {mode}",
            )

        measured = _with_batch_size(config, measure)
        log.info("%s: perplexity %.4f of %s tokens, BOS %s", name, measured.value, f"{measured.tokens:,}", mode)
        entry[f"bos_{mode}"] = measured.value
        entry["tokens"][f"bos_{mode}"] = measured.tokens
        bits = measured.bits_per_byte(work.streams[name], loaded.tokenizer)
        entry["bits_per_byte"][f"bos_{mode}"] = bits
    return entry


def _with_batch_size(config: EvaluationConfig, run: Callable[[int], T]) -> T:
    """Run with the configured batch size; ``auto`` halves it until it fits into memory."""
    if config.batch_size != "auto":
        return run(int(config.batch_size))

    def attempt(batch_size: int) -> T:  # the library requires this name of the first argument
        return run(batch_size)

    return find_executable_batch_size(attempt, starting_batch_size=LARGEST_BATCH)()


def _check(models: Sequence[str], config: EvaluationConfig) -> None:
    """Refuse settings that are wrong for any model."""
    for name in models:
        if models.count(name) > 1:
            raise UserError(f"the model {name} is named twice")
    if len({clean_name(name.strip("/")) for name in models}) < len(models):
        raise UserError("two models' logs would get the same name: evaluate them apart")
    config.check()
    for path in config.texts:
        if not Path(path).exists():
            raise UserError(f"{path} does not exist")
    if config.prompts is not None:
        read_prompts(config.prompts, config.prompt_share)


def results_table(results: dict[str, Any]) -> str:
    """The results as a table: a row per measurement, a column per model."""
    columns: dict[str, dict[str, float]] = {}
    for model, found in {**results["models"], **results.get("generated", {})}.items():
        row: dict[str, float] = {}
        for name, entry in found.get("perplexity", {}).items():
            row |= {f"{name} ppl ({mode})": value for mode, value in entry.items() if mode.startswith("bos_")}
            row |= {f"{name} bits/byte ({mode})": value for mode, value in entry.get("bits_per_byte", {}).items()}
        for task, metrics in found.get("tasks", {}).items():
            row |= {f"{task} {m}": v for m, v in metrics.items() if "stderr" not in m and m != "num_fewshot"}
        row |= {f"mean of {suite}": value for suite, value in found.get("averages", {}).items()}
        for name, scores in found.get("continuations", {}).items():
            row |= {f"{name} {score}": value for score, value in scores.items()}
        columns[model] = row
    names = list(dict.fromkeys(name for row in columns.values() for name in row))
    width = max((len(name) for name in names), default=0)
    widths = {model: max(len(model), 10) for model in columns}
    lines = [" " * width + "".join(f"  {model:>{widths[model]}}" for model in columns)]
    for name in names:
        cells = (f"{columns[m][name]:.4f}" if name in columns[m] else "" for m in columns)
        lines.append(f"{name:{width}}" + "".join(f"  {c:>{widths[m]}}" for c, m in zip(cells, columns, strict=True)))
    return "\n".join(lines)
