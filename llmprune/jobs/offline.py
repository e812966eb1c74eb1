"""Files that a job reads from a network: list them, fetch them beforehand, and run without a network."""

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import transformers
from huggingface_hub import snapshot_download
from streaming.base.format.base.reader import FileInfo
from transformers import AutoConfig

from llmprune.config.schema import Config, ScoringConfig
from llmprune.config.section_registry import sections_of
from llmprune.data.cache import check_file
from llmprune.data.format import DataManifest
from llmprune.evaluation.settings import LiveEvaluationConfig, TasksConfig
from llmprune.evaluation.suites import SUITES
from llmprune.models.hub import fetch_model
from llmprune.models.loading import load_tokenizer
from llmprune.models.source import resolve_model
from llmprune.models.stored_weights import StoredWeights
from llmprune.utils.errors import UserError, first_line
from llmprune.utils.files import inside, read_json, temporary_for
from llmprune.utils.object_store import open_store

KINDS = ("model", "dataset", "task", "data")
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


@dataclass(frozen=True)
class Need:
    """Something that a job fetches from a network.

    Attributes:
        kind: ``model`` or ``dataset`` (from the hub), ``task`` (of lm-eval, or a suite) or ``data`` (prepared data
            at a URL).
        name: name on the hub or in lm-eval, or the URL.
        include_path: folder with the user's own task files; None = none.
    """

    kind: str
    name: str
    include_path: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def needs_of(job: Config | ScoringConfig) -> Iterator[Need]:
    """List what a job reads from a network; local files are left out."""
    named: list[str | None] = [job.model.path, job.model.tokenizer]
    if isinstance(job, Config):
        named += [name for section in sections_of(job) for name in section.models()]
        if "://" in job.data.path:
            yield Need("data", job.data.path)
        if (evaluation := job.section(LiveEvaluationConfig)) is not None:
            for task in evaluation.tasks:
                yield Need("task", task, evaluation.include_path)
    for name in dict.fromkeys(named):
        if name is not None and not Path(name).exists():
            yield Need("model", name)


def need_named(name: str, tasks: Iterable[str]) -> Need:
    """Find the kind of thing that a name given by a user means; ``dataset:NAME`` states the kind."""
    kind, separator, rest = name.partition(":")
    if separator and kind in KINDS:
        return Need(kind, rest)
    if "://" in name:
        return Need("data", name)
    if name in SUITES or name in tasks:
        return Need("task", name)
    return Need("model", name)


def fetch(need: Need, out: Path) -> Path:
    """Fetch something into a folder with the layout of ``HF_HOME``; an interrupted download resumes.

    Files of the hub and of tasks are written to the cache folder of this process; this is ``out`` if ``HF_HOME`` named
    ``out`` when the process started.

    Returns:
        Folder of the fetched files.

    Raises:
        UserError: it can't be fetched.
    """
    if need.kind == "data":
        return _fetch_data(need.name, out / "data")
    if need.kind == "task":
        _load_task(need)
        return out / "datasets"
    if need.kind == "model":
        folder = fetch_model(need.name, out / "hub")
        _check_model(folder)
        return folder
    try:
        place = snapshot_download(need.name, repo_type=need.kind, cache_dir=out / "hub")
    except Exception as error:  # the hub client raises many kinds: bad names, no network, no access
        raise UserError(f"the {need} can't be fetched ({first_line(error)})") from None
    return Path(place)


def _check_model(folder: Path) -> None:
    """Check that a fetched model's tokenizer, config and weights can be loaded without a network.

    Raises:
        UserError: one of them can't be loaded.
    """
    if any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        load_tokenizer(folder)
    if not any(folder.glob("model*.safetensors")):  # the name was that of a tokenizer, or of an adapter
        return
    StoredWeights(folder)
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a config's contents can cause any kind of error
        raise UserError(f"{folder} was fetched, but can't be loaded: {first_line(error)}") from None


def _load_task(need: Need) -> None:
    from llmprune.evaluation.tasks import Tasks  # lm-eval takes seconds to import

    Tasks(TasksConfig([need.name], include_path=need.include_path))


def _fetch_data(url: str, out: Path) -> Path:
    """Copy prepared data; files that exist already are not copied again."""
    store = open_store(url)
    folder = out / url.rstrip("/").rpartition("/")[2]
    names = store.names("")
    if "manifest.json" not in names:
        raise UserError(f"{url} holds no prepared data (no manifest.json)")
    for name in sorted(names, key=lambda name: name == "manifest.json"):  # the manifest is last: it marks completion
        place = inside(folder, name)
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            part = temporary_for(place)
            try:
                store.get(name, part)
                part.replace(place)
            finally:
                part.unlink(missing_ok=True)
    DataManifest.load(folder)
    for index in sorted(folder.rglob("index.json")):
        _check_shards(index)
    return folder


def _check_shards(index: Path) -> None:
    """Compare shards with their index; a damaged file is removed, so that the next call fetches it again."""
    try:
        described = [FileInfo(**(shard["zip_data"] or shard["raw_data"])) for shard in read_json(index)["shards"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{index} is no index of shards ({error})") from None
    for info in described:
        path = inside(index.parent, info.basename)
        try:
            check_file(path, info, path)
        except (UserError, OSError):
            path.unlink(missing_ok=True)
            raise UserError(f"{path} did not arrive whole: run the same command again") from None


def go_offline() -> None:
    """Make every library of this process, and of its child processes, work without a network."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"
    # These libraries have already read their environment variables.
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    hub: Any = sys.modules["transformers.utils.hub"]
    hub._is_offline_mode = True
    assert transformers.utils.is_offline_mode()


def check_offline(job: Config | ScoringConfig, yaml: str) -> None:
    """Go offline, and check that everything which a job reads from a network is available locally.

    Raises:
        UserError: something is missing, or the job would need a network while it runs; the message lists all of it.
    """
    go_offline()
    missing, online = [], []
    for need in needs_of(job):
        try:
            if need.kind == "data":
                missing.append(f"{need} (name the folder that it was copied to in data.path)")
            elif need.kind == "task":
                _load_task(need)
            else:
                resolve_model(need.name)
        except UserError:
            missing.append(str(need))
    if isinstance(job, Config):
        if job.checkpoint.remote is not None and "://" in job.checkpoint.remote:
            online.append("checkpoint.remote is a URL")
        if job.loggers.wandb is not None and not job.loggers.wandb.offline:
            online.append("loggers.wandb.offline is false")
    if online:
        raise UserError(f"run.offline is true, but {' and '.join(online)}")
    if missing:
        home = huggingface_hub.constants.HF_HOME
        raise UserError(
            f"offline, these are not here: {', '.join(missing)}. On a machine with a network run `llmprune download "
            f"--for {yaml} --out DIR`, and set HF_HOME=DIR where the job runs (now {home})"
        )
