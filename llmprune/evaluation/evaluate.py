"""The quality of one or several models: perplexity, tasks, continuations."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import find_executable_batch_size
from tqdm import tqdm

from llmprune.data.sources import clean_name
from llmprune.errors import UserError
from llmprune.evaluation.continuations import (
    GenerationConfig,
    continuation_scores,
    read_prompts,
    save_continuations,
    write_continuations,
)
from llmprune.evaluation.perplexity import PerplexityConfig, bos_of, measure_perplexity, read_tokens
from llmprune.evaluation.tasks import Tasks, TasksConfig, language_model, save_samples
from llmprune.files import output_folder
from llmprune.models.opened import OpenedModel, Placement, open_model

SCHEMA = 1
LARGEST_BATCH = 64  # where ``auto`` begins


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured of every model.

    Attributes:
        texts: files and folders to measure perplexity on: text, Markdown, JSON lines or prepared data.
        perplexity: how.
        tasks: which tasks.
        prompts: file of prompts with references to write continuations for.
        prompt_share: see ``read_prompts``.
        generation: how continuations are written.
        batch_size: samples per forward pass; ``auto`` = the most that fit.
    """

    texts: Sequence[str] = ()
    perplexity: PerplexityConfig = field(default_factory=PerplexityConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    prompts: str | None = None
    prompt_share: float | None = None
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    batch_size: int | str = 8


def evaluate(
    models: Sequence[str],
    config: EvaluationConfig,
    placement: Placement,
    samples: Path | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Measure models one after the other.

    Args:
        models: folders or hub names.
        config: what is measured.
        placement: how the models are held.
        samples: folder to write, for logs of every question and every continuation.
        overwrite: whether ``samples`` may be replaced.

    Returns:
        What results.json holds.

    Raises:
        UserError: something is impossible; as far as it can be known, before any model is opened.
    """
    if not (config.texts or config.tasks.names or config.prompts):
        raise UserError("say what to evaluate: --perplexity FILE, --tasks NAMES, --prompts FILE or --generated FILE")
    _check_names(models)
    if isinstance(config.batch_size, str) and config.batch_size != "auto":
        raise UserError(f"batch_size is '{config.batch_size}'; it must be a positive number or auto")
    if isinstance(config.batch_size, int) and config.batch_size < 1:
        raise UserError(f"batch_size is {config.batch_size}; it must be a positive number or auto")
    config.perplexity.check()
    config.generation.check()
    for path in config.texts:
        if not Path(path).exists():
            raise UserError(f"{path} does not exist")
    if config.prompts is not None:
        prompts = read_prompts(config.prompts, config.prompt_share)
        if not any(prompt.reference for prompt in prompts):
            raise UserError(f"{config.prompts} has no references to score against: `llmprune generate` needs none")
    placement.check()
    tasks = Tasks(config.tasks) if config.tasks.names else None
    results: dict[str, Any] = {"schema": SCHEMA, "models": {}}
    keeps = samples is not None and bool(config.tasks.names or config.prompts)
    with output_folder(samples, overwrite) if samples is not None and keeps else nullcontext() as logs:
        for name in tqdm(models, desc="models", disable=len(models) < 2):
            folder = None if logs is None else logs / clean_name(name.strip("/"))
            if folder is not None:
                folder.mkdir()
            results["models"][name] = evaluate_model(open_model(name, placement), config, tasks, folder)
    return results


def evaluate_model(
    opened: OpenedModel, config: EvaluationConfig, tasks: Tasks | None, samples: Path | None
) -> dict[str, Any]:
    """Measure one model; see ``evaluate``."""
    found: dict[str, Any] = {"parameters": opened.parameters}
    for path in config.texts:
        found.setdefault("perplexity", {}).update(_perplexities(opened, path, config))
    if tasks is not None:
        ran = tasks.run(language_model(opened.model, opened.tokenizer, batch_size=config.batch_size))
        assert ran is not None  # there is one rank
        found |= {"tasks": ran.tasks, "averages": ran.averages}
        if samples is not None:
            save_samples(ran.samples, samples)
    if config.prompts is not None:
        prompts = read_prompts(config.prompts, config.prompt_share)
        records = write_continuations(opened, prompts, config.generation)
        found["continuations"] = {Path(config.prompts).stem: continuation_scores(records)}
        if samples is not None:
            save_continuations(records, samples / "continuations.jsonl")
    return found


def _perplexities(opened: OpenedModel, path: str, config: EvaluationConfig) -> dict[str, dict[str, Any]]:
    settings = config.perplexity
    found = {}
    for name, tokens in read_tokens(path, opened.tokenizer, settings).items():
        entry: dict[str, Any] = {
            "segment": settings.segment,
            "stride": settings.stride or settings.segment,
            "tokens": {},
        }
        for mode in settings.bos:

            def measure(batch_size: int, mode: str = mode, tokens: Any = tokens) -> Any:
                bos = bos_of(opened.tokenizer)
                return measure_perplexity(opened.model, tokens, settings, mode, bos=bos, batch_size=batch_size)

            if config.batch_size == "auto":
                measured = find_executable_batch_size(measure, starting_batch_size=LARGEST_BATCH)()
            else:
                measured = measure(int(config.batch_size))
            entry[f"bos_{mode}"] = measured.value
            entry["tokens"][f"bos_{mode}"] = measured.tokens
        found[name] = entry
    return found


def _check_names(models: Sequence[str]) -> None:
    for name in models:
        if models.count(name) > 1:
            raise UserError(f"the model {name} is named twice")
    if len({clean_name(name.strip("/")) for name in models}) < len(models):
        raise UserError("two models' logs would get the same name: evaluate them apart")


def table(results: dict[str, Any]) -> str:
    """The results as a table: models by what was measured."""
    columns: dict[str, dict[str, float]] = {}
    for model, found in {**results["models"], **results.get("generated", {})}.items():
        row: dict[str, float] = {}
        for name, entry in found.get("perplexity", {}).items():
            row |= {f"{name} ppl ({mode})": value for mode, value in entry.items() if mode.startswith("bos_")}
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
