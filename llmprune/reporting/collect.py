"""Collecting the material of a report: runs, models, scores and measurements in the folders that a user names."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from llmprune.checkpoints.metrics import read_metrics
from llmprune.checkpoints.run_folder import RunFolder
from llmprune.config.yaml_files import read_yaml
from llmprune.data.sources import clean_name
from llmprune.evaluation.continuations import read_continuations
from llmprune.models.loading import count_parameters
from llmprune.models.source import read_config
from llmprune.models.stored_weights import StoredWeights
from llmprune.plans.plan import Plan
from llmprune.plans.recorded import APPLIED
from llmprune.pruning.scoring.scores import Scores
from llmprune.reporting.names import short_names
from llmprune.utils.errors import UserError, first_line
from llmprune.utils.files import parse_json, read_json
from llmprune.utils.outputs import LOG

T = TypeVar("T")
U = TypeVar("U")

# Exceptions that a file with other contents than llmprune's can cause.
ODD = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)
CONTINUATIONS = "continuations"  # name of a folder of continuations, one file per model
FIRST_LINE = 2**20  # largest number of bytes of a record of continuations


@dataclass(frozen=True)
class ReportedRun:
    """A training run.

    Attributes:
        name: short name of the run folder; see ``short_names``.
        path: path of the run folder.
        config: resolved config of the run.
        metrics: lines of the run's metrics.jsonl.
    """

    name: str
    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def prunes(self) -> bool:
        """Whether the run trained gates."""
        return self.config.get("l0_pruning") is not None

    @property
    def started(self) -> datetime:
        """The time of the first line of the run's log.txt; without one, that of its config.yaml."""
        try:
            with (self.path / LOG).open(encoding="utf-8", errors="replace") as file:
                return datetime.strptime(file.readline()[:19], "%Y-%m-%d %H:%M:%S")
        except (OSError, ValueError):
            return datetime.fromtimestamp(RunFolder(self.path).config.stat().st_mtime)

    @property
    def batches(self) -> int:
        """The number of batches trained."""
        return max((line.get("time/batch", 0) for line in self.metrics), default=0)

    @property
    def progress(self) -> float:
        """Share of the run that is complete, by batches, samples or tokens, depending on the unit of its duration."""
        text = str(self.config["train"]["duration"])
        for unit, counter in (("ba", "batch"), ("sp", "sample"), ("tok", "token")):
            if text.endswith(unit):
                done = max((line.get(f"time/{counter}", 0) for line in self.metrics), default=0)
                if unit == "ba" and self.metrics:
                    done += 1
                elif self.batches:
                    done *= 1 + 1 / self.batches  # a line is written before its batch is counted
                return min(done / float(text.removesuffix(unit)), 1.0)
        return 1.0


@dataclass(frozen=True)
class Model:
    """A model on disk, with the plan that it was cut by, if there is one."""

    name: str
    path: Path
    plan: Plan | None
    parameters: int

    @property
    def cut(self) -> bool:
        """Whether the plan removes or merges anything."""
        return self.plan is not None and changes(self.plan)


def changes(plan: Plan) -> bool:
    """Whether a plan removes or merges anything."""
    merged = any(block.merge is not None for block in plan.blocks)
    return plan.shape != plan.source or merged or bool(plan.skipped)


@dataclass
class Material:
    """Everything that was found.

    A model has one name wherever it is found: its absolute path if it lies on this machine, otherwise the name that the
    file has for it.

    Attributes:
        runs: training runs, in the order in which they were started.
        models: Hugging Face models, in the order of ``labels``.
        plans: plans outside models, by path.
        scores: scores of blocks, by the path of their file.
        results: contents of results.json files, by path.
        speeds: contents of speed.json files, by path.
        continuations: records of continuations by model, in the order of ``labels``.
        labels: short label of every model: those of results first, in their order.
        left_out: reasons why files and folders can't be reported on, by path.
    """

    runs: list[ReportedRun] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)
    plans: dict[Path, Plan] = field(default_factory=dict)
    scores: dict[Path, Scores] = field(default_factory=dict)
    results: dict[Path, dict[str, Any]] = field(default_factory=dict)
    speeds: dict[Path, dict[str, Any]] = field(default_factory=dict)
    continuations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    left_out: dict[Path, str] = field(default_factory=dict)

    def label(self, model: str) -> str:
        """The label of a model; the last part of the name of something that is no model, such as a file of texts."""
        return self.labels.get(model) or Path(model).name

    def made(self, found: Mapping[Path, T], make: Callable[[Path, T], Iterable[U]]) -> list[U]:
        """The items that ``make`` returns for all of ``found``; errors are stored in ``left_out``."""
        whole: list[U] = []
        for path, content in found.items():
            try:
                whole += [*make(path, content)]
            except ODD as error:
                self.left_out.setdefault(path, f"{type(error).__name__}: {first_line(error)}")
        return whole

    def __bool__(self) -> bool:
        """Whether anything was found."""
        return any((self.runs, self.models, self.plans, self.scores, self.results, self.speeds, self.continuations))


def collect(paths: Sequence[Path | str]) -> Material:
    """Collect files and folders, and the contents of folders that are neither a run nor a model.

    Raises:
        UserError: a path does not exist, or none of them has anything to report.
    """
    material = Material()
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path} does not exist")
        added, reason = _try(material, path)
        if reason is not None:
            raise UserError(f"{path} can't be reported on: {reason}")
        for inner in sorted(path.iterdir()) if path.is_dir() and not added else ():
            added, reason = _try(material, inner)
            if not added and reason is None and inner.is_dir():
                added, reason = _try(material, inner, _add_parts)
            if reason is not None:
                material.left_out[inner] = reason
    if not material:
        raise UserError(
            f"{', '.join(map(str, paths))}: no run, model, plan, scores, results, speeds or continuations there; name "
            "the folder of a run, or one that holds several"
        )
    _name(material)
    return material


def source_of(models: Mapping[str, Any]) -> str | None:
    """The source model in a results.json or speed.json: the first one, if none is larger and another is smaller."""
    sizes = [entry.get("parameters") for entry in models.values()]
    if not all(isinstance(size, int) for size in sizes) or len(sizes) < 2:
        return None
    return next(iter(models)) if sizes[0] == max(sizes) > min(sizes) else None


def _name(material: Material) -> None:
    """Name and order runs and models."""
    material.runs.sort(key=lambda run: run.started)
    names = short_names([str(run.path) for run in material.runs])
    material.runs = [replace(run, name=name) for run, name in zip(material.runs, names, strict=True)]

    measured = [content["models"] for content in (*material.results.values(), *material.speeds.values())]
    sources = [source for models in measured if (source := source_of(models)) is not None]
    known = [name for models in measured for name in models]
    known += [os.path.abspath(model.path) for model in material.models]
    continued: dict[str, list[dict[str, Any]]] = {}
    for name, records in material.continuations.items():
        continued.setdefault(_writer(name, known, sources), []).extend(records)
    known = list(dict.fromkeys((*known, *continued)))
    for name, label in zip(known, short_names(known), strict=True):
        material.labels[name] = f"{label} (source)" if name in sources and label != "source" else label
    material.continuations = {name: continued[name] for name in known if name in continued}
    material.models.sort(key=lambda model: known.index(os.path.abspath(model.path)))
    material.models = [replace(m, name=material.labels[os.path.abspath(m.path)]) for m in material.models]


def _writer(name: str, known: Sequence[str], sources: Sequence[str]) -> str:
    """The model that wrote a file of continuations, which has the model's name; ``name`` itself if it is not known."""
    if name in known:
        return name
    written = Path(name).stem
    for model in known:
        if written in (Path(model).name, clean_name(model.strip("/"))):
            return model
    return sources[0] if written == "source" and sources else name.removesuffix(".jsonl")


def _identity(name: str, folder: Path) -> str:
    """The absolute path of a model that a file in ``folder`` names; the name if there is no such model here."""
    for place in (Path(name), folder / Path(name).name):
        if name and os.path.isfile(place / "config.json"):
            return os.path.abspath(place)
    return name


def _try(
    material: Material, path: Path, add: Callable[[Material, Path], bool] | None = None
) -> tuple[bool, str | None]:
    """Add ``path`` to the material; returns whether its kind is known, and the reason if it can't be read."""
    try:
        return (add or _add)(material, path), None
    except UserError as error:
        return False, str(error)
    except ODD as error:
        return False, f"{type(error).__name__}: {first_line(error)}"


def _add(material: Material, path: Path) -> bool:
    """Add ``path`` to the material; returns False if its kind is unknown."""
    if path.is_dir():
        return _add_folder(material, path)
    if path.suffix == ".jsonl":
        return _add_continuations(material, path)
    if path.suffix != ".json":
        return False
    content = read_json(path)
    if not isinstance(content, dict) or content.get("schema") != 1:
        return False
    if "blocks" in content and "num_blocks" in content:
        material.scores[path] = Scores.load(path)
    elif "blocks" in content and "family" in content:
        material.plans[path] = Plan.load(path)
    elif isinstance(content.get("models"), dict) and (content["models"] or content.get("generated")):
        if not all(isinstance(entry, dict) for entry in content["models"].values()):
            raise UserError("its models are no results")
        names = {name: _identity(name, path.parent) for name in content["models"]}
        if len(set(names.values())) < len(names):
            names = {name: name for name in names}
        for name, model in names.items():
            log = path.with_suffix(".samples") / clean_name(name.strip("/")) / "continuations.jsonl"
            if log.is_file():
                material.continuations[model] = read_continuations(log)
        content["models"] = {names[name]: entry for name, entry in content["models"].items()}
        measured = any("generation" in entry for entry in content["models"].values())
        (material.speeds if measured else material.results)[path] = content
    else:
        return False
    return True


def _add_continuations(material: Material, path: Path) -> bool:
    """Add a file of continuations; returns False for other JSON lines, such as prompts."""
    with path.open("rb") as file:
        try:
            first = parse_json(file.readline(FIRST_LINE), finite=False)
        except ValueError:
            return False
    if not isinstance(first, dict) or not {"prompt", "output"} <= first.keys():
        return False
    material.continuations[str(path)] = read_continuations(path)
    return True


def _add_folder(material: Material, path: Path) -> bool:
    folder = RunFolder(path)
    if folder.config.is_file() and (folder.metrics.is_file() or folder.checkpoints.is_dir()):
        config = read_yaml(folder.config)
        if "train" not in config:
            return False
        needed = [config["train"], config.get("model")]
        optional = [config.get(name) or {} for name in ("l0_pruning", "dynamic_loading")]
        if not all(isinstance(section, dict) for section in needed + optional) or "duration" not in needed[0]:
            raise UserError("its config.yaml is of no run of llmprune")
        material.runs.append(ReportedRun(path.name, path, config, read_metrics(folder.metrics)))
        return True
    if (path / "config.json").is_file():
        plan = path / APPLIED
        material.models.append(Model(path.name, path, Plan.load(plan) if plan.is_file() else None, _parameters(path)))
        return True
    return False


def _add_parts(material: Material, path: Path) -> bool:
    """Add what is looked for in a folder inside a folder: scores of a job, and continuations."""
    if RunFolder(path).config.is_file() and (scores := path / "scores.json").is_file():
        return _add(material, scores)
    if path.name == CONTINUATIONS:
        added = [_add_continuations(material, file) for file in sorted(path.glob("*.jsonl"))]
        return any(added)
    return False


def _parameters(model: Path) -> int:
    """The number of parameters of a model; from its config if it is quantised, because its weights are packed."""
    if "quantization_config" in read_json(model / "config.json"):
        return count_parameters(read_config(model))
    weights = StoredWeights(model)
    return sum(math.prod(weights.shape(name)) for name in weights)
