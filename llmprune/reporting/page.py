"""The report: one HTML file without external files."""

import datetime
import itertools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from llmprune.checkpoints.run_folder import RunFolder
from llmprune.conversion.commands import last_evaluation
from llmprune.data.sources import clean_name
from llmprune.measurement.results import rows as speed_rows
from llmprune.plans.plan import Plan
from llmprune.plans.recorded import APPLIED
from llmprune.reporting.collect import Material, ReportedRun, changes, collect
from llmprune.reporting.figures import (
    Picture,
    picture_of_plan,
    pictures_of_quality,
    pictures_of_run,
    pictures_of_scores,
)
from llmprune.reporting.headline import first_generation, headline
from llmprune.reporting.names import short_names
from llmprune.reporting.numbers import ABSENT, shown
from llmprune.utils.files import write_text
from llmprune.utils.outputs import output_folder, refuse_existing, refuse_replacing

Table = tuple[str, Sequence[str], list[list[str]]]  # heading, column names, rows of cells
SAMPLES = 3  # number of prompts whose continuations are shown


@dataclass(frozen=True)
class Sample:
    """A prompt, and how models continue it.

    Attributes:
        prompt: text that the models were given.
        answers: label and continuation of each model; the original continuation comes first, if it is known.
    """

    prompt: str
    answers: Sequence[tuple[str, str]]


@dataclass
class PageSection:
    """A section of the page.

    Attributes:
        title: heading of the section.
        warnings: sentences below the heading that are emphasised.
        notes: further sentences.
        samples: texts of models, side by side.
        pictures: figures.
        tables: tables, each with heading, column names and rows of cells.
        commands: command lines to repeat the work.
    """

    title: str
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether the section has any content."""
        return bool(self.warnings or self.notes or self.samples or self.pictures or self.tables or self.commands)


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
    answer = headline(material)
    sections = [section for section in _sections(material) if section]
    if plots is not None:
        with output_folder(plots, overwrite) as folder:
            pictures = [picture for section in sections for picture in section.pictures]
            for picture, name in zip(pictures, _file_names(pictures), strict=True):
                picture.save(folder, name)
    environment = Environment(loader=PackageLoader("llmprune.reporting"), autoescape=True, undefined=StrictUndefined)
    environment.tests["number"] = lambda cell: re.match(r"[\d.,]+(?= |$)", cell) is not None
    page = environment.get_template("page.html").render(
        title=", ".join(Path(path).absolute().name for path in paths),
        headline=answer,
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
        _samples(material),
        _quality(material),
        _plans(material),
        _training(material),
        _scores(material),
    ]
    left_out = [f"{path} is left out: {reason}" for path, reason in material.left_out.items()]
    return [*sections, PageSection("Left out", warnings=left_out), _commands(material)]


def _drawn(pictures: Iterable[Picture]) -> list[Picture]:
    """Render each figure once, so that errors of drawing occur here; returns the figures."""
    found = [*pictures]
    for picture in found:
        _ = picture.svg
    return found


def _quality(material: Material) -> PageSection:
    def measured(path: Path, speed: dict[str, Any]) -> Iterable[tuple[str, float]]:
        found = [(model, first_generation(entry)) for model, entry in speed["models"].items()]
        return [(model, float(entry["tokens_per_s"])) for model, entry in found if entry is not None]

    speeds = dict(material.made(material.speeds, measured))
    names = _labels([path.with_suffix("") for path in material.results])

    def pictures(path: Path, results: dict[str, Any]) -> list[Picture]:
        return _drawn(pictures_of_quality(names[path.with_suffix("")], results, speeds, material.label))

    def table(path: Path, results: dict[str, Any]) -> list[Table]:
        models = {material.label(name): entry for name, entry in results["models"].items()}
        return [_result_table(str(path), {**models, **results.get("generated", {})})]

    return PageSection(
        "Quality against size and speed",
        pictures=material.made(material.results, pictures),
        tables=[
            *material.made(material.results, table),
            *material.made(material.speeds, lambda path, speed: [_speed_table(path, speed, material)]),
        ],
    )


def _labels(paths: Sequence[Path]) -> dict[Path, str]:
    return dict(zip(paths, short_names([str(path) for path in paths]), strict=True))


def _scores(material: Material) -> PageSection:
    places = [path.absolute().parent if path.stem == "scores" else path.with_suffix("") for path in material.scores]
    names = dict(zip(material.scores, short_names([str(place) for place in places]), strict=True))
    pictures = material.made(material.scores, lambda path, scores: _drawn(pictures_of_scores(names[path], scores)))
    return PageSection("Scores", pictures=pictures)


def _result_table(heading: str, models: Mapping[str, Any]) -> Table:
    """A table of sizes, perplexity, tasks and continuations: measurements by model."""
    rows = []
    sizes = [entry.get("parameters") for entry in models.values()]
    if any(sizes):
        rows.append(["parameters", *(shown(size) if size else ABSENT for size in sizes)])
    for kind, words in (
        ("perplexity", "perplexity of {}, {}"),
        ("tasks", "{}, {}"),
        ("continuations", "continuations of {}, {}, %"),
    ):
        measured = dict.fromkeys(
            (name, metric)
            for entry in models.values()
            for name, metrics in entry.get(kind, {}).items()
            for metric, value in metrics.items()
            if (isinstance(value, float) or value is None) and "stderr" not in metric
        )
        for name, metric in measured:
            cells = (_cell(entry.get(kind, {}).get(name, {}), metric) for entry in models.values())
            rows.append([words.format(name, metric.replace("bos_", "BOS ").replace("_", " ")), *cells])
    return heading, ["", *models], rows


def _cell(values: Mapping[str, Any], key: str) -> str:
    return shown(values[key]) if key in values else ABSENT


def _speed_table(path: Path, speed: dict[str, Any], material: Material) -> Table:
    cells = []
    for row in speed_rows(speed):
        work = f"{row['kind']}, batch {row['batch']}, {row['prompt_tokens']} tokens"
        work += f" → {row['output_tokens']}" if "output_tokens" in row else ""
        work += "" if row.get("cached", True) else ", uncached"
        latency = (
            f"{shown(row['latency_s_mean'] * 1e3)} ± {shown(row['latency_s_std'] * 1e3, 2)}"
            if "latency_s_mean" in row
            else "out of memory"
        )
        ratio = (
            f"{shown(row['speedup_p50'], 3)} ({shown(row['speedup_p10'], 3)}–{shown(row['speedup_p90'], 3)})"
            if "speedup_p50" in row
            else ABSENT
        )
        memory = row.get("peak_memory_bytes")
        cells.append(
            [
                material.label(row["model"]),
                work,
                latency,
                _cell(row, "tokens_per_s"),
                ratio,
                shown(memory / 1e6) if memory else ABSENT,
            ]
        )
    heads = ["model", "work", "latency, ms", "tokens/s", "times as fast as the first", "memory, MB"]
    return f"{path} ({speed['device']}, {speed['dtype']})", heads, cells


def _plans(material: Material) -> PageSection:
    """Draw every plan once: the models that were cut by it share a picture."""
    drawn: dict[Any, tuple[Path, Plan, list[str]]] = {}
    for model in material.models:
        if model.plan is not None and model.cut:
            drawn.setdefault(_what_stays(model.plan), (model.path, model.plan, []))[2].append(model.name)
    for path, label in _labels([*material.plans]).items():
        plan = material.plans[path]
        if changes(plan):
            drawn.setdefault(_what_stays(plan), (path, plan, [label]))
    plans = {path: (plan, ", ".join(names)) for path, plan, names in drawn.values()}
    section = PageSection(
        "Models and plans", pictures=material.made(plans, lambda _, found: _drawn([picture_of_plan(*found)]))
    )
    if material.models:
        rows = [[model.name, f"{model.parameters:,}", _shape(model.plan)] for model in material.models]
        section.tables.append(("", ["model", "parameters", "shape (of the source)"], rows))
    return section


def _what_stays(plan: Plan) -> tuple[Any, ...]:
    return plan.source, plan.blocks, plan.hidden, plan.vocabulary, plan.skipped


def _shape(plan: Plan | None) -> str:
    if plan is None:
        return ABSENT
    now, source = vars(plan.shape), vars(plan.source)
    return ", ".join(
        f"{name.replace('_', ' ')} {now[name]:,}" + (f" ({source[name]:,})" if now[name] != source[name] else "")
        for name in now
        if now[name] is not None
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
    return [[run.name, _kind(run), str(run.config["train"]["duration"]), _cell(found, "loss")]]


def _kind(run: ReportedRun) -> str:
    if run.prunes:
        target = run.config["l0_pruning"].get("target") or {}
        goal = ", ".join(f"{name} {value}" for name, value in target.items() if value is not None)
        if not goal and (share := run.config["l0_pruning"].get("target_sparsity")) is not None:
            goal = f"a sparsity of {share}"
        return f"L0 pruning to {goal}" if goal else "L0 pruning"
    return "pretraining" if run.config["model"].get("path") is None else f"continued from {run.config['model']['path']}"


def _samples(material: Material) -> PageSection:
    """Pair the continuations by prompt: the prompts that most models continued come first."""
    by_prompt: dict[str, dict[str, dict[str, Any]]] = {}
    for model, records in material.continuations.items():
        for record in records:
            if isinstance(prompt := record.get("prompt"), str):
                by_prompt.setdefault(prompt, {}).setdefault(material.label(model), record)  # the first of several
    section = PageSection("Text samples")
    for prompt, found in sorted(by_prompt.items(), key=lambda item: -len(item[1]))[:SAMPLES]:
        original = next((record["reference"] for record in found.values() if record.get("reference")), None)
        answers = [] if original is None else [("the original", original.strip())]
        answers += [(label, record["output"].strip() or "(nothing)") for label, record in found.items()]
        section.samples.append(Sample(prompt, answers))
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
            plan = shlex.quote(str(model.path / APPLIED))
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
