"""Collecting the material of a report: runs, models, scores and measurements in the folders that a user names."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from llmprune.pruning.scoring.scores import Scores
from llmprune.utils.errors import UserError, first_line
from llmprune.utils.files import read_json

T = TypeVar("T")
U = TypeVar("U")

# Exceptions that a file with other contents than llmprune's can cause.
ODD = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)


@dataclass(frozen=True)
class ReportedRun:
    """A training run.

    Attributes:
        name: name of the run folder; the whole path if another run has the same name.
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
        return self.plan is not None and (
            self.plan.shape != self.plan.source or any(block.merge is not None for block in self.plan.blocks)
        )


@dataclass
class Material:
    """Everything that was found.

    Attributes:
        runs: training runs.
        models: Hugging Face models.
        scores: scores of blocks, by the path of their file.
        results: contents of results.json files, by path.
        speeds: contents of speed.json files, by path.
        continuations: records of continuations by model, from the logs beside a results.json.
        left_out: reasons why files and folders can't be reported on, by path.
    """

    runs: list[ReportedRun] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)
    scores: dict[Path, Scores] = field(default_factory=dict)
    results: dict[Path, dict[str, Any]] = field(default_factory=dict)
    speeds: dict[Path, dict[str, Any]] = field(default_factory=dict)
    continuations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    left_out: dict[Path, str] = field(default_factory=dict)

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
        return bool(self.runs or self.models or self.scores or self.results or self.speeds)


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
            if reason is not None:
                material.left_out[inner] = reason
    material.runs = [replace(run, name=name) for run, name in zip(material.runs, _names(material.runs), strict=True)]
    material.models = [replace(m, name=name) for m, name in zip(material.models, _names(material.models), strict=True)]
    if not material:
        raise UserError(
            f"{', '.join(map(str, paths))}: no run, model, scores, results or speeds there; name the folder of a run, "
            "or one that holds several"
        )
    return material


def _names(found: Sequence[ReportedRun] | Sequence[Model]) -> list[str]:
    return list(short_names([one.path for one in found]).values())


def short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """The last part of every path; the whole path if another one has the same last part."""
    last = [path.name for path in paths]
    return {path: path.name if last.count(path.name) == 1 else str(path) for path in paths}


def _try(material: Material, path: Path) -> tuple[bool, str | None]:
    """Add ``path`` to the material; returns whether its kind is known, and the reason if it can't be read."""
    try:
        return _add(material, path), None
    except UserError as error:
        return False, str(error)
    except ODD as error:
        return False, f"{type(error).__name__}: {first_line(error)}"


def _add(material: Material, path: Path) -> bool:
    """Add ``path`` to the material; returns False if its kind is unknown."""
    if path.is_dir():
        return _add_folder(material, path)
    if path.suffix != ".json":
        return False
    content = read_json(path)
    if not isinstance(content, dict) or content.get("schema") != 1:
        return False
    if "blocks" in content and "num_blocks" in content:
        material.scores[path] = Scores.load(path)
    elif isinstance(content.get("models"), dict) and (content["models"] or content.get("generated")):
        if not all(isinstance(entry, dict) for entry in content["models"].values()):
            raise UserError("its models are no results")
        measured = any("generation" in entry for entry in content["models"].values())
        (material.speeds if measured else material.results)[path] = content
        for model in content["models"]:
            log = path.with_suffix(".samples") / clean_name(model.strip("/")) / "continuations.jsonl"
            if log.is_file():
                material.continuations[model] = read_continuations(log)
    else:
        return False
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
        plan = path / "llmprune" / "plan.json"
        material.models.append(Model(path.name, path, Plan.load(plan) if plan.is_file() else None, _parameters(path)))
        return True
    if folder.config.is_file() and (scores := path / "scores.json").is_file():
        return _add(material, scores)
    return False


def _parameters(model: Path) -> int:
    """The number of parameters of a model; from its config if it is quantised, because its weights are packed."""
    if "quantization_config" in read_json(model / "config.json"):
        return count_parameters(read_config(model))
    weights = StoredWeights(model)
    return sum(math.prod(weights.shape(name)) for name in weights)
