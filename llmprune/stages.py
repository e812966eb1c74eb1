"""What jobs of several steps share: a folder that knows its job, and recovery as one of its steps.

Every step leaves something that appears whole or not at all, so that a job which was stopped goes on at the step it was
in; a recovery goes on from its newest checkpoint.
"""

import copy
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from llmprune.config import Config
from llmprune.convert.commands import convert
from llmprune.errors import UserError
from llmprune.files import remove
from llmprune.job_files import load_job, save_config
from llmprune.ranks import on_rank_zero
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
    if folder.exists() and any(folder.iterdir()):
        before = load_job(known) if known.is_file() else None
        if not isinstance(before, Config) or type(before) is not type(config):
            raise UserError(f"{folder} holds something that is no {kind}: choose another run.folder")
        if config.run.overwrite:
            shutil.rmtree(folder)
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


def _identity(config: Config) -> dict[str, object]:
    """What decides what comes out, by key."""
    found: dict[str, object] = {}
    for section, value in asdict(config).items():
        values = {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
        found |= {key: v for key, v in values.items() if section not in _FREE and key not in _FREE}
    return found


def recover(config: Config, place: Path, *, name: str, seed: int) -> None:
    """Train ``place``/pruned as the job's sections say, in ``place``/recover, and export it to ``place``/recovered.

    Args:
        config: of the job.
        place: the step's folder.
        name: of the run.
        seed: of the order of its data.
    """
    if (place / "recovered").exists():
        return
    run = replace(config.run, name=name, folder=str(place / "recover"), seed=seed, autoresume=True, overwrite=False)
    parts = {part: copy.deepcopy(getattr(config, part)) for part in Config.__dataclass_fields__}
    train(Config(**{**parts, "run": run, "model": replace(config.model, path=str(place / "pruned"))}))

    def export() -> None:
        convert(place / "recover", place / "recovered")

    on_rank_zero(export)


def keep_result(folder: Path, result: Path) -> None:
    """Copy the model that a job ends with to ``folder``/model, if it is not there yet."""
    final = folder / "model"
    if not final.exists():
        temporary = folder / ".model.tmp"
        remove(temporary)
        shutil.copytree(result, temporary)
        temporary.rename(final)
    print(f"{final}: the result of {result}")
