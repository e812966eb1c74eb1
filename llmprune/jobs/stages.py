"""Functions of jobs with several steps: the folder records its job, and recovery is one of the steps.

The result of every step appears completely or not at all, so a stopped job resumes at the interrupted step; a recovery
resumes from its newest checkpoint.
"""

import copy
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from composer.core import Time
from transformers import PretrainedConfig

from llmprune.config.job_files import load_recorded, save_config
from llmprune.config.schema import Config, IterationConfig, SearchConfig
from llmprune.config.section_registry import sections_of, with_sections
from llmprune.config.yaml_files import read_yaml
from llmprune.conversion.commands import convert
from llmprune.data.calibration import check_calibration
from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.data.prepared import PreparedData
from llmprune.jobs.score import score
from llmprune.jobs.train import train
from llmprune.models.placement import Placement
from llmprune.models.source import longest_input
from llmprune.pruning.scoring.scores import Scores
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.training.checks import check, inputs_of
from llmprune.utils.checksums import CHECKSUMS, describe_file
from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json, temporary_for, write_json
from llmprune.utils.outputs import clear, is_empty, refuse_deleting, refuse_replacing, remove
from llmprune.utils.processes import TERMINATION, Preempted
from llmprune.utils.ranks import on_rank_zero
from llmprune.utils.recorded_settings import as_typed, leaves

_FREE = (  # settings that may change when a job resumes: where it runs, and what it shows
    "run.name", "run.folder", "run.overwrite", "run.autoresume", "loggers", "checkpoint", "evaluation", "sharding",
    "train.device", "train.microbatch_size", "train.eval_interval", "train.eval_first", "data.cache", "data.workers",
    "data.prefetch", "data.eval_samples_per_domain",
)  # fmt: skip

ScoringJobConfig = IterationConfig | SearchConfig

_INPUTS = "inputs.json"  # file in the job's folder: hashes of the inputs' contents when the job began


def begin(config: ScoringJobConfig, kind: str) -> None:
    """Make the job's folder, or check that an existing folder belongs to this job.

    Args:
        config: config of the job.
        kind: description of the job's kind for messages, such as "search".

    Raises:
        UserError: the folder contains something else, or the same kind of job with other settings.
    """
    folder = Path(config.run.folder)
    known = folder / "config.yaml"
    refuse_deleting(folder)
    try:
        before = load_recorded(known) if known.is_file() else None
    except UserError as error:  # a job of another version: its settings can't be compared
        if not (config.run.overwrite and read_yaml(known).get("job") == config.job):
            raise UserError(f"{error}: begin anew with run.overwrite=true, or choose another run.folder") from None
        before = config
    if not is_empty(folder) and type(before) is not type(config):
        raise UserError(f"{folder} holds something that is no {kind}: choose another run.folder")
    if isinstance(before, Config) and not (config.run.overwrite or config.run.autoresume):
        raise UserError(f"{folder} holds a {kind}: pass run.autoresume=true to resume it, or run.overwrite=true")
    if isinstance(before, Config) and before is not config and config.run.autoresume:
        try:
            _refuse_other(folder, before, config)
            return
        except UserError:
            if not config.run.overwrite:
                raise
    refuse_replacing(folder, [*inputs_of(config), *_calibration_text(config)])
    clear(folder)
    save_config(config, known)
    write_json(folder / _INPUTS, {"schema": 1, "contents": _contents(config)})


def _refuse_other(folder: Path, before: Config, config: ScoringJobConfig) -> None:
    """Raise ``UserError`` if a job is not the job that its folder was begun with.

    Inputs are compared by the hashes of their contents where these are known, so moved or renamed data are accepted.
    """
    record = folder / _INPUTS
    known = read_json(record) if record.is_file() else {}  # stopped at once: no record, paths are compared
    known = known.get("contents", {}) if isinstance(known, dict) else {}
    now = _contents(config)
    was, asked = _identity(before), _identity(config)
    for key in sorted({*was, *asked}):
        one, other = was.get(key), asked.get(key)
        same = one == other
        if isinstance(one, str) and isinstance(other, str) and one in known and other in now:
            same = known[one] == now[other]
        if not same:
            changed = f"{key} {one}" if one != other else f"other contents of {key}"
            raise UserError(
                f"{folder} was begun with {changed}; the config asks for {other}: keep what it began with, or use "
                "another run.folder"
            )


def _contents(config: ScoringJobConfig) -> dict[str, str]:
    """Hashes of the contents of everything that the job reads, by path; inputs without a hash are left out."""
    paths = dict.fromkeys([*inputs_of(config), config.data.path, *_calibration_text(config)])
    found = {path: content_of(path) for path in paths if path}
    return {path: content for path, content in found.items() if content is not None}


def content_of(path: str) -> str | None:
    """The hash of a data set's manifest, of the checksums of a model of llmprune's, or of a file; None = unknown."""
    place = Path(path)
    if "://" in path or (place / "manifest.json").is_file():
        return PreparedData(path).manifest.fingerprint()
    if (place / CHECKSUMS).is_file():
        place = place / CHECKSUMS
    return str(describe_file(place)["sha256"]) if place.is_file() else None


def _identity(config: Config) -> dict[str, object]:
    """The settings that change the job's result, by key."""
    free = set(_FREE)
    if isinstance(config, SearchConfig):
        free.discard("data.eval_samples_per_domain")  # the held-out loss chooses the winner
    for section in sections_of(config):
        free.difference_update(section.decides)
    values = dict(leaves(as_typed(asdict(config))))
    return {key: value for key, value in values.items() if not any(f"{key}.".startswith(f"{one}.") for one in free)}


def _calibration_text(config: ScoringJobConfig) -> list[str]:
    """The calibration text that the job names, as a list of one path; empty if calibration uses the training data."""
    path = config.layer_scoring.data.path
    return [] if path is None else [path]


def asked_to_end() -> Preempted:
    """The exception that ends a job when it is asked to end, between steps or within a step."""
    return Preempted("the steps that are done are kept")


def recover(
    config: Config, place: Path, *, name: str, seed: int, pruned: Path | None = None, share: float = 1.0
) -> None:
    """Train ``place``/pruned by the job's sections, in ``place``/recover, and export it to ``place``/recovered.

    Args: see ``recovery_of``.
    """
    if (place / "recovered").exists():
        return
    with TERMINATION.noted():  # the run saves a checkpoint and ends by itself
        train(recovery_of(config, place, name=name, seed=seed, pruned=pruned, share=share))

    def export() -> None:
        convert(place / "recover", place / "recovered")

    on_rank_zero(export)


def recovery_of(
    config: Config, place: Path, *, name: str, seed: int, pruned: Path | None = None, share: float = 1.0
) -> Config:
    """The config of the run that recovers ``place``/pruned.

    Args:
        config: config of the job.
        place: folder of the step.
        name: name of the run.
        seed: seed of the order of the run's data.
        pruned: folder of the model; None = ``place``/pruned.
        share: share of ``train.duration`` that the run takes.
    """
    run = replace(config.run, name=name, folder=str(place / "recover"), seed=seed, autoresume=True, overwrite=False)
    schema = with_sections(Config)
    parts = {key.name: copy.deepcopy(getattr(config, key.name)) for key in fields(schema)}
    if config.checkpoint.remote is not None:  # every recovery is a separate run, with a separate remote folder
        within = place.relative_to(config.run.folder).as_posix()
        parts["checkpoint"] = replace(config.checkpoint, remote=f"{config.checkpoint.remote.rstrip('/')}/{within}")
    if share != 1:
        parts["train"] = replace(config.train, duration=shortened(config.train.duration, share))
    model = replace(config.model, path=str(pruned or place / "pruned"))
    return schema(**{**parts, "job": "train", "run": run, "model": model})


def shortened(duration: str, share: float) -> str:
    """A share of a duration, one unit at least.

    >>> shortened("1000ba", 0.1), shortened("3ba", 0.1)
    ('100ba', '1ba')
    """
    whole = Time.from_timestring(duration)
    return Time(max(round(whole.value * share), 1), whole.unit).to_timestring()


def check_pruning_job(config: ScoringJobConfig) -> str:
    """Check a job that prunes by scores and recovers; returns the model's folder or name.

    Raises:
        UserError: a setting does not fit.
    """
    if config.model.path is None:
        raise UserError(f"{config.job} prunes a model: name it with model.path")
    for section in sections_of(config):
        section.check_steps(config.job, again=isinstance(config, IterationConfig) and config.iterate.rounds > 1)
    if config.layer_scoring.data.path is None and "://" in config.data.path:
        raise UserError("calibration samples are read from this machine: name text with layer_scoring.data.path")
    check(config)
    return config.model.path


def scoring_of(config: ScoringJobConfig, criteria: Sequence[str]) -> LayerScoringConfig:
    """The settings for scoring a model in the job.

    Args:
        config: config of the job.
        criteria: criteria that decide; ``layer_scoring.criteria`` may name more, whose scores are saved too.
    """
    names = list(dict.fromkeys([*criteria, *(config.layer_scoring.criteria or ())]))
    return replace(config.layer_scoring, data=calibration_of(config), criteria=names)


def calibration_of(config: ScoringJobConfig) -> CalibrationConfig:
    """The settings of the calibration samples: by default of the training data."""
    own = config.layer_scoring.data
    return replace(own, path=own.path or config.data.path)


def check_scoring(config: ScoringJobConfig, model: PretrainedConfig, criteria: Sequence[str]) -> None:
    """Check, before the folder is touched, that the model can be scored as the job says.

    Args:
        config: config of the job.
        model: config of the model.
        criteria: names of the criteria that decide.

    Raises:
        UserError: a criterion is unknown or not for this model, or the samples can't be had.
    """
    settings = scoring_of(config, criteria)
    settings.names(model)
    check_calibration(settings.data, longest_input(model))


def placement_of(config: ScoringJobConfig) -> Placement:
    """The device and the number format in which the job's models are scored and evaluated."""
    whole = config.train.precision == "fp32" or config.model.dtype != "float32"
    return Placement(config.model.dtype if whole else "auto", config.train.device)


def score_for(config: ScoringJobConfig, model: str, criteria: Sequence[str]) -> Scores:
    """Score a model with the job's settings; ``criteria`` are the criteria that decide."""
    placement = replace(placement_of(config), attention=config.model.attention)
    return score(model, scoring_of(config, criteria), placement, tokenizer=config.model.tokenizer)


def keep_result(folder: Path, result: Path) -> None:
    """Copy the final model of a job to ``folder``/model, unless it is there already."""
    final = folder / "model"
    if final.exists() and read_json(final / CHECKSUMS) != read_json(result / CHECKSUMS):
        remove(final)  # an earlier result: the model of a candidate that was the best so far
    if not final.exists():
        temporary = temporary_for(final)
        shutil.copytree(result, temporary)
        temporary.rename(final)
    print(f"{final}: the result of {result}")
