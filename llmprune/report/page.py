"""The report: one HTML file that needs nothing else."""

import datetime
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from llmprune.convert.commands import last_evaluation
from llmprune.data.sources import clean_name
from llmprune.files import write_text
from llmprune.measurement.results import rows as speed_rows
from llmprune.outputs import output_folder, refuse_existing, refuse_replacing
from llmprune.report.collect import Material, Model, Run, collect
from llmprune.report.figures import Picture, pictures_of_quality, pictures_of_runs, pictures_of_scores
from llmprune.report.plan_picture import picture_of_plan
from llmprune.run_folder import RunFolder

SAMPLES = 3  # prompts whose continuations are shown


@dataclass
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        warnings: sentences below it that stand out.
        notes: further sentences.
        tables: (heading, column names, rows of cells).
        pictures: figures.
        texts: (who, prompt, what was written).
        commands: to be shown as they are typed.
    """

    title: str
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[tuple[str, Sequence[str], list[list[str]]]] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    texts: list[tuple[str, str, str]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.warnings or self.notes or self.tables or self.pictures or self.texts or self.commands)


def write_report(
    paths: Sequence[Path | str], out: Path | str, *, plots: Path | str | None = None, overwrite: bool = False
) -> Path:
    """Write a report on runs, models, scores and measurements.

    Args:
        paths: files and folders; see ``collect``.
        out: the HTML file.
        plots: folder for every figure as PNG, with its numbers as CSV.
        overwrite: whether ``plots`` may be replaced.

    Raises:
        UserError: there is nothing to report, or ``plots`` would replace what is reported on.
    """
    if plots is not None:
        refuse_existing(Path(plots), overwrite)
        refuse_replacing(plots, [*paths, out])
    material = collect(paths)
    sections = [section for section in _sections(material) if section]
    names = [clean_name(picture.name) for section in sections for picture in section.pictures]
    assert len(set(names)) == len(names)
    if plots is not None:
        with output_folder(plots, overwrite) as folder:
            for section in sections:
                for picture in section.pictures:
                    picture.save(folder)
    environment = Environment(loader=PackageLoader("llmprune.report"), autoescape=True, undefined=StrictUndefined)
    environment.tests["number"] = lambda cell: re.match(r"[\d.,]+(?= |$)", cell) is not None
    page = environment.get_template("page.html").render(
        title=", ".join(Path(path).name for path in paths),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("llmprune"),
        sections=sections,
    )
    write_text(out, page)
    return Path(out)


def _sections(material: Material) -> list[Section]:
    left_out = [f"{path} is left out: {reason}" for path, reason in material.left_out.items()]
    return [
        Section("Left out", warnings=left_out),
        _quality(material),
        _speed(material),
        _models(material),
        _training(material),
        Section("Scores", pictures=list(pictures_of_scores(material))),
        _samples(material),
        _commands(material),
    ]


def _quality(material: Material) -> Section:
    section = Section("Quality", pictures=list(pictures_of_quality(material)))
    for path, results in material.results.items():
        section.tables += _result_tables(str(path), {**results["models"], **results.get("generated", {})})
    return section


def _result_tables(place: str, models: dict[str, Any]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Perplexity, tasks and continuations: what was measured by models."""
    tables: list[tuple[str, Sequence[str], list[list[str]]]] = []
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
    """The last parts of models' names, where they are still different."""
    names = [Path(model).name for model in models]
    return names if len(set(names)) == len(names) else models


def _speed(material: Material) -> Section:
    section = Section("Speed and memory")
    for path, speed in material.speeds.items():
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
        section.tables.append((f"{path} ({speed['device']}, {speed['dtype']})", heads, cells))
    return section


def _models(material: Material) -> Section:
    section = Section("Models")
    if material.models:
        rows = [[model.name, f"{model.parameters:,}", _shape(model)] for model in material.models]
        section.tables.append(("", ["model", "parameters", "shape (of the source)"], rows))
    section.pictures = [picture_of_plan(m.plan, m.name) for m in material.models if m.plan is not None and m.cut]
    return section


def _shape(model: Model) -> str:
    if model.plan is None:
        return ""
    now, source = vars(model.plan.shape), vars(model.plan.source)
    return ", ".join(
        f"{name.replace('_', ' ')} {now[name]}" + (f" ({source[name]})" if now[name] != source[name] else "")
        for name in now
    )


def _training(material: Material) -> Section:
    section = Section("Training", pictures=list(pictures_of_runs(material)))
    rows = []
    for run in material.runs:
        if run.progress < 1:
            section.warnings.append(
                f"{run.name} is not finished: {run.progress:.0%} of {run.config['train']['duration']} are done; what "
                "follows is what there is."
            )
        found = last_evaluation(RunFolder(run.path).metrics, run.batches + 1)
        rows.append([run.name, _kind(run), str(run.config["train"]["duration"]), _number(found.get("loss"))])
    if rows:
        section.tables.append(("", ["run", "job", "duration", "last evaluation loss, nats per token"], rows))
    return section


def _kind(run: Run) -> str:
    if run.prunes:
        target = run.config["l0_pruning"].get("target") or {}
        goal = ", ".join(f"{name} {value}" for name, value in target.items() if value is not None)
        return f"L0 pruning to {goal or run.config['l0_pruning'].get('target_sparsity')}"
    return "pretraining" if run.config["model"].get("path") is None else f"continued from {run.config['model']['path']}"


def _samples(material: Material) -> Section:
    section = Section("Samples of text")
    prompts = list(dict.fromkeys(r["prompt"] for records in material.continuations.values() for r in records))
    for prompt in prompts[:SAMPLES]:
        for model, records in material.continuations.items():
            written = next((r["output"] for r in records if r["prompt"] == prompt), None)
            if written is not None:
                section.texts.append((Path(model).name, prompt, written))
    return section


def _commands(material: Material) -> Section:
    section = Section("Commands")
    for run in material.runs:
        section.commands.append(f"composer train.py {shlex.quote(str(run.path / 'config.yaml'))} run.folder=ANOTHER")
    pruning = [run.path for run in material.runs if run.prunes]
    for model in material.models:
        if model.plan is not None and model.plan.factors:  # gates have left them: they were trained with the weights
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
