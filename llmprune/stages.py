"""What jobs of several steps share: a folder that knows its job, and recovery as one of its steps.

Every step leaves something that appears whole or not at all, so that a job which was stopped goes on at the step it was
in; a recovery goes on from its newest checkpoint.
"""

import copy
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from llmprune.checks import check
from llmprune.config import Config, SearchConfig
from llmprune.convert.commands import convert
from llmprune.data.calibration import CalibrationConfig
from llmprune.errors import UserError
from llmprune.files import is_leftover, refuse_replacing, remove
from llmprune.job_files import load_recorded, save_config
from llmprune.ranks import on_rank_zero
from llmprune.recorded import as_typed
from llmprune.training import train

_FREE = (  # what may change when a job goes on: where it runs, and what it shows
    "run.name", "run.folder", "run.overwrite", "run.autoresume", "loggers", "checkpoint", "evaluation", "sharding",
    "train.device", "train.microbatch_size", "train.eval_interval", "train.eval_first", "data.cache", "data.workers",
    "data.prefetch", "data.eval_samples_per_domain",
)  # fmt: skip


def begin(config: Config, kind: str) -> None:
    """Make the job's folder, or see that what it holds is this job's.

    Args:
        config: of the job.
        kind: what the job is, in words.

    Raises:
        UserError: the folder holds something else, or the same kind of job with other settings.
    """
    folder = Path(config.run.folder)
    known = folder / "config.yaml"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.folder {folder} is a file: choose another folder")
    if folder.exists() and any(not is_leftover(path) for path in folder.iterdir()):
        before = load_recorded(known) if known.is_file() else None
        if not isinstance(before, Config) or type(before) is not type(config):
            raise UserError(f"{folder} holds something that is no {kind}: choose another run.folder")
        if config.run.overwrite:
            refuse_replacing(folder, _inputs(config))
            for path in [*folder.iterdir()]:
                if path != known:  # stays throughout: a kill leaves what is still known as a job
                    remove(path)
        elif not config.run.autoresume:
            raise UserError(f"{folder} holds a {kind}: pass run.autoresume=true to go on, or run.overwrite=true")
        else:
            was, now = _identity(before), _identity(config)
            for key in sorted({*was, *now}):
                if was.get(key) != now.get(key):
                    raise UserError(
                        f"{folder} was begun with {key} {was.get(key)}; the config asks for {now.get(key)}: keep what "
                        "it began with, or use another run.folder"
                    )
            return
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, known)


def _inputs(config: Config) -> list[str]:
    """What the job reads, if it lies in folders."""
    teacher = None if config.distillation is None else config.distillation.teacher
    return [
        path
        for path in (config.model.path, config.model.tokenizer, config.data.path, teacher)
        if path and "://" not in path
    ]


def _identity(config: Config) -> dict[str, object]:
    """What decides what comes out, by key."""
    free = set(_FREE)
    if isinstance(config, SearchConfig):
        free.discard("data.eval_samples_per_domain")  # the held-out loss decides
    if config.dynamic_loading is not None:
        free.discard("train.eval_interval")  # after evaluations the mix changes
    if config.lora is not None:
        free.discard("train.microbatch_size")  # what is dropped goes by it
    found: dict[str, object] = {}
    for section, value in as_typed(asdict(config)).items():
        values = {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
        found |= {key: v for key, v in values.items() if section not in free and key not in free}
    return found


def recover(config: Config, place: Path, *, name: str, seed: int) -> None:
    """Train ``place``/pruned as the job's sections say, in ``place``/recover, and export it to ``place``/recovered.

    Args: see ``recovery_of``.
    """
    if (place / "recovered").exists():
        return
    train(recovery_of(config, place, name=name, seed=seed))

    def export() -> None:
        convert(place / "recover", place / "recovered")

    on_rank_zero(export)


def recovery_of(config: Config, place: Path, *, name: str, seed: int) -> Config:
    """The run that recovers ``place``/pruned.

    Args:
        config: of the job.
        place: the step's folder.
        name: of the run.
        seed: of the order of its data.
    """
    run = replace(config.run, name=name, folder=str(place / "recover"), seed=seed, autoresume=True, overwrite=False)
    parts = {part: copy.deepcopy(getattr(config, part)) for part in Config.__dataclass_fields__}
    if config.checkpoint.remote is not None:  # every recovery is a run of its own
        within = place.relative_to(config.run.folder).as_posix()
        parts["checkpoint"] = replace(config.checkpoint, remote=f"{config.checkpoint.remote.rstrip('/')}/{within}")
    return Config(**{**parts, "run": run, "model": replace(config.model, path=str(place / "pruned"))})


def check_pruning_job(config: Config, kind: str, calibration: CalibrationConfig) -> str:
    """What every job that prunes by scores and recovers needs; returns the model's folder or name.

    Args:
        config: of the job.
        kind: what it is, in a word.
        calibration: its samples.

    Raises:
        UserError: something does not fit.
    """
    if config.model.path is None:
        raise UserError(f"{kind} prunes a model: name it with model.path")
    for name in ("l0_pruning", "block_replacement"):
        if getattr(config, name) is not None:
            raise UserError(f"{kind} prunes by scores: leave out {name}")
    if config.distillation is not None and (
        config.distillation.plan is not None or config.distillation.blocks is not None
    ):
        raise UserError(f"what {kind} recovers are models of several plans: leave out distillation.plan and blocks")
    if calibration.path is None and "://" in config.data.path:
        raise UserError(f"calibration samples are read from this machine: name text with {kind}.calibration.path")
    check(config)
    return config.model.path


def keep_result(folder: Path, result: Path) -> None:
    """Copy the model that a job ends with to ``folder``/model, if it is not there yet."""
    final = folder / "model"
    if not final.exists():
        temporary = folder / ".model.tmp"
        remove(temporary)
        shutil.copytree(result, temporary)
        temporary.rename(final)
    print(f"{final}: the result of {result}")
