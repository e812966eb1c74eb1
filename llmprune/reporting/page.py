"""The report: one HTML file without external files."""

import datetime
import itertools
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from llmprune.checkpoints.run_folder import RunFolder
from llmprune.conversion.commands import last_evaluation
from llmprune.data.sources import clean_name
from llmprune.measurement.results import rows as speed_rows
from llmprune.reporting.collect import Material, Model, ReportedRun, collect, short_names
from llmprune.reporting.figures import (
    Picture,
    fastest,
    picture_of_plan,
    pictures_of_quality,
    pictures_of_run,
    pictures_of_scores,
)
from llmprune.utils.files import write_text
from llmprune.utils.outputs import output_folder, refuse_existing, refuse_replacing

Table = tuple[str, Sequence[str], list[list[str]]]  # heading, column names, rows of cells
SAMPLES = 3  # number of prompts whose continuations are shown


@dataclass
class PageSection:
    """A section of the page.

    Attributes:
        title: heading of the section.
        warnings: sentences below the heading that are emphasised.
        notes: further sentences.
        tables: tables, each with heading, column names and rows of cells.
        pictures: figures.
        texts: texts of models, each with model name, prompt and continuation.
        commands: command lines to repeat the work.
    """

    title: str
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    texts: list[tuple[str, str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether the section has any content."""
        return bool(self.warnings or self.notes or self.tables or self.pictures or self.texts or self.commands)


def write_report(
    paths: Sequence[Path | str], out: Path | str, *, plots: Path | str | None = None, overwrite: bool = False
) -> Path:
    """Write a report on runs, models, scores and measurements.

    Args:
        paths: files and folders; see ``collect``.
        out: path of the HTML file.
        plots: folder for every figure as PNG, with its numbers as CSV; None = no such folder.
        overwrite: whether ``plots`` may be replaced.

    Raises:
        UserError: there is nothing to report, or ``plots`` would replace an input.
    """
    if plots is not None:
        refuse_existing(Path(plots), overwrite)
        refuse_replacing(plots, [*paths, out])
    material = collect(paths)
    sections = [section for section in _sections(material) if section]
    if plots is not None:
        with output_folder(plots, overwrite) as folder:
            pictures = [picture for section in sections for picture in section.pictures]
            for picture, name in zip(pictures, _file_names(pictures), strict=True):
                picture.save(folder, name)
    environment = Environment(loader=PackageLoader("llmprune.reporting"), autoescape=True, undefined=StrictUndefined)
    environment.tests["number"] = lambda cell: re.match(r"[\d.,]+(?= |$)", cell) is not None
    page = environment.get_template("page.html").render(
        title=", ".join(Path(path).name for path in paths),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("llmprune"),
        sections=sections,
    )
    write_text(out, page.encode(errors="replace").decode())  # file names may contain bytes that are no text
    return Path(out)


def _file_names(pictures: Sequence[Picture]) -> list[str]:
    """A unique name for each figure's files; a repeated name gets a number."""
    names: list[str] = []
    for picture in pictures:
        name = clean_name(picture.name)
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        names.append(name if name not in names else next(other for other in numbered if other not in names))
    return names


def _sections(material: Material) -> list[PageSection]:
    sections = [
        _quality(material),
        _speed(material),
        _models(material),
        _training(material),
        _scores(material),
        _samples(material),
        _commands(material),
    ]
    left_out = [f"{path} is left out: {reason}" for path, reason in material.left_out.items()]
    return [PageSection("Left out", warnings=left_out), *sections]


def _drawn(pictures: Iterable[Picture]) -> list[Picture]:
    """Render each figure once, so that errors of drawing occur here; returns the figures."""
    found = [*pictures]
    for picture in found:
        _ = picture.svg
    return found


def _quality(material: Material) -> PageSection:
    def measured(path: Path, speed: dict[str, Any]) -> Iterable[tuple[str, float]]:
        return [(m, found) for m, entry in speed["models"].items() if (found := fastest(entry)) is not None]

    speeds = dict(material.made(material.speeds, measured))
    names = short_names([path.with_suffix("") for path in material.results])

    def pictures(path: Path, results: dict[str, Any]) -> list[Picture]:
        return _drawn(pictures_of_quality(names[path.with_suffix("")], results, speeds))

    def tables(path: Path, results: dict[str, Any]) -> list[Table]:
        return _result_tables(str(path), {**results["models"], **results.get("generated", {})})

    return PageSection(
        "Quality", pictures=material.made(material.results, pictures), tables=material.made(material.results, tables)
    )


def _scores(material: Material) -> PageSection:
    names = short_names([path.parent if path.stem == "scores" else path.with_suffix("") for path in material.scores])
    named = dict(zip(material.scores, names.values(), strict=True))
    pictures = material.made(material.scores, lambda path, scores: _drawn(pictures_of_scores(named[path], scores)))
    return PageSection("Scores", pictures=pictures)


def _result_tables(place: str, models: dict[str, Any]) -> list[Table]:
    """Tables of perplexity, tasks and continuations: measurements by model."""
    tables: list[Table] = []
    for heading, kind in (
        ("Perplexity", "perplexity"),
        ("Tasks", "tasks"),
        ("Continuations, percent", "continuations"),
    ):
        measured = dict.fromkeys(
            (name, metric)
            for entry in models.values()
            for name, metrics in entry.get(kind, {}).items()
            for metric, value in metrics.items()
            if isinstance(value, float) and "stderr" not in metric
        )
        if measured:
            rows = [
                [
                    f"{name}, {_words(metric)}",
                    *(_number(e.get(kind, {}).get(name, {}).get(metric)) for e in models.values()),
                ]
                for name, metric in measured
            ]
            tables.append((f"{heading} ({place})", ["", *_short(list(models))], rows))
    return tables


def _words(metric: str) -> str:
    return metric.replace("bos_", "BOS ").replace("_", " ")


def _short(models: list[str]) -> list[str]:
    """The last parts of models' names; the whole names if two last parts are equal."""
    names = [Path(model).name for model in models]
    return names if len(set(names)) == len(names) else models


def _speed(material: Material) -> PageSection:
    return PageSection("Speed and memory", tables=material.made(material.speeds, lambda *found: [_speed_table(*found)]))


def _speed_table(path: Path, speed: dict[str, Any]) -> Table:
    names = dict(zip(speed["models"], _short(list(speed["models"])), strict=True))
    cells = []
    for row in speed_rows(speed):
        work = f"{row['kind']}, batch {row['batch']}, {row['prompt_tokens']} tokens"
        work += f" → {row['output_tokens']}" if "output_tokens" in row else ""
        latency = (
            f"{row['latency_s_mean'] * 1e3:.1f} ± {row['latency_s_std'] * 1e3:.1f}"
            if "latency_s_mean" in row
            else "out of memory"
        )
        ratio = (
            f"{row['speedup_p50']:.2f} ({row['speedup_p10']:.2f}–{row['speedup_p90']:.2f})"
            if "speedup_p50" in row
            else ""
        )
        memory = row.get("peak_memory_bytes")
        cells.append(
            [
                names[row["model"]],
                work,
                latency,
                _number(row.get("tokens_per_s")),
                ratio,
                f"{memory / 1e6:.0f}" if memory else "",
            ]
        )
    heads = ["model", "work", "latency, ms", "tokens/s", "times as fast as the first", "memory, MB"]
    return f"{path} ({speed['device']}, {speed['dtype']})", heads, cells


def _models(material: Material) -> PageSection:
    def pictures(path: Path, model: Model) -> list[Picture]:
        return _drawn([picture_of_plan(model.plan, model.name)] if model.plan is not None and model.cut else [])

    section = PageSection("Models", pictures=material.made({m.path: m for m in material.models}, pictures))
    if material.models:
        rows = [[model.name, f"{model.parameters:,}", _shape(model)] for model in material.models]
        section.tables.append(("", ["model", "parameters", "shape (of the source)"], rows))
    return section


def _shape(model: Model) -> str:
    if model.plan is None:
        return ""
    now, source = vars(model.plan.shape), vars(model.plan.source)
    return ", ".join(
        f"{name.replace('_', ' ')} {now[name]}" + (f" ({source[name]})" if now[name] != source[name] else "")
        for name in now
    )


def _training(material: Material) -> PageSection:
    runs = {run.path: run for run in material.runs}
    section = PageSection("Training", pictures=material.made(runs, lambda _, run: _drawn(pictures_of_run(run))))
    section.warnings = material.made(runs, _unfinished)
    rows = material.made(runs, _training_row)
    if rows:
        section.tables.append(("", ["run", "job", "duration", "last evaluation loss, nats per token"], rows))
    return section


def _unfinished(path: Path, run: ReportedRun) -> list[str]:
    if run.progress >= 1:
        return []
    return [
        f"{run.name} is not finished: {run.progress:.0%} of {run.config['train']['duration']} are done; what follows "
        "is what there is."
    ]


def _training_row(path: Path, run: ReportedRun) -> list[list[str]]:
    found = last_evaluation(RunFolder(path).metrics, run.batches + 1)
    return [[run.name, _kind(run), str(run.config["train"]["duration"]), _number(found.get("loss"))]]


def _kind(run: ReportedRun) -> str:
    if run.prunes:
        target = run.config["l0_pruning"].get("target") or {}
        goal = ", ".join(f"{name} {value}" for name, value in target.items() if value is not None)
        return f"L0 pruning to {goal or run.config['l0_pruning'].get('target_sparsity')}"
    return "pretraining" if run.config["model"].get("path") is None else f"continued from {run.config['model']['path']}"


def _samples(material: Material) -> PageSection:
    section = PageSection("Samples of text")
    given = (r.get("prompt") for records in material.continuations.values() for r in records)
    for prompt in [*dict.fromkeys(prompt for prompt in given if isinstance(prompt, str))][:SAMPLES]:
        for model, records in material.continuations.items():
            written = next((r["output"] for r in records if r.get("prompt") == prompt), None)
            if written is not None:
                section.texts.append((Path(model).name, prompt, written))
    return section


def _commands(material: Material) -> PageSection:
    section = PageSection("Commands")
    for run in material.runs:
        section.commands.append(f"composer train.py {shlex.quote(str(run.path / 'config.yaml'))} run.folder=ANOTHER")
    pruning = [run.path for run in material.runs if run.prunes]
    for model in material.models:
        if model.plan is not None and model.plan.factors:  # a plan made by gates, which were trained with the weights
            trained = shlex.quote(str(pruning[0])) if len(pruning) == 1 else "RUN"
            section.commands.append(f"llmprune convert {trained} --out ANOTHER")
        elif model.cut:
            plan = shlex.quote(str(model.path / "llmprune" / "plan.json"))
            section.commands.append(f"llmprune apply SOURCE {plan} --out ANOTHER")
    for content in (*material.results.values(), *material.speeds.values()):
        if "command" in content:
            section.commands.append(content["command"])
    if section.commands:
        section.notes.append(
            "Each makes what is shown here again: ANOTHER is a new folder, SOURCE the model that a plan was made for, "
            "RUN the run that trained the gates, and what --out names must be new as well."
        )
    return section


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4f}"
