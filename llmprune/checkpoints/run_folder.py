"""A run is a folder: resolved config, metrics, gates, checkpoints and the manifest that describes them.

RUN/
  config.yaml        the resolved config
  metrics.jsonl      everything logged
  log.txt            messages of train.py
  gates/             gate values at every evaluation (pruning)
  checkpoints/       Composer checkpoints; ``latest-rank0.pt`` points to the newest complete one
    manifest.json    description of the checkpoints: it is read before anything of theirs is loaded
    baN.sums-R.json  checksums of the part of checkpoint baN that rank R wrote
    model/           Hugging Face config, tokenizer and generation config of the model in the checkpoints
"""

import copy
import importlib.metadata
import logging
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from composer.utils import dist
from omegaconf.errors import OmegaConfBaseException
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llmprune.checkpoints.checkpoint_folder import LATEST, METADATA, CheckpointFolder, batch_of, records_in
from llmprune.config.section_registry import all_sections
from llmprune.models.companions import GENERATION, name_inputs, save_model_config
from llmprune.utils.checksums import compare_checksums, describe_file, read_record, record
from llmprune.utils.errors import UserError, first_line
from llmprune.utils.files import inside, read_json, temporary_for, write_json
from llmprune.utils.job_log import logged_in
from llmprune.utils.object_store import Store
from llmprune.utils.outputs import (
    clear,
    is_empty,
    output_folder,
    refuse_deleting,
    remove,
    working_folder,
)
from llmprune.utils.outputs import mark as mark_folder
from llmprune.utils.ranks import on_rank_zero
from llmprune.utils.recorded_settings import settings_from

log = logging.getLogger(__name__)
S = TypeVar("S")

RANDOM = "random"  # the source of a model with random weights
PACKAGES = ("llmprune", "torch", "mosaicml", "mosaicml-streaming", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """Paths of the parts of a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """Everything logged, as JSON lines."""
        return self.path / "metrics.jsonl"

    @property
    def gates(self) -> Path:
        """Gate values at every evaluation."""
        return self.path / "gates"

    @property
    def checkpoints(self) -> Path:
        """Composer checkpoints and their manifest."""
        return self.path / "checkpoints"

    def latest_checkpoint(self, *, contents: bool = False) -> Path | None:
        """The newest complete checkpoint, if there is one; see ``CheckpointFolder.latest``."""
        return CheckpointFolder(self.checkpoints).latest(contents=contents)

    def fetch(self, store: Store, *, shared: bool = True) -> None:
        """Copy the newest complete checkpoint of a store, and the files that it needs, to this folder.

        A checkpoint whose copy has wrong checksums is skipped with a warning that names it.

        Args:
            store: remote store of the run's checkpoints.
            shared: whether all machines share this folder. If so, nothing is copied if the folder has an equally new or
                newer checkpoint. Otherwise, all machines resume from the store's checkpoint, and a newer local
                checkpoint is set aside, because other machines do not have it.

        Raises:
            UserError: the store can't be reached, has another run, or all its checkpoints are damaged; or it has none
                and a machine that does not share the folder has a checkpoint.
        """
        names = store.names("")
        self._check_same(store, names)
        here, failed = self.latest_checkpoint(contents=True) if shared else None, None
        for batch, records in records_in(names).items():
            if here is not None and batch_of(here) >= batch:
                return
            try:
                if self._fetch_checkpoint(store, records, names):
                    print(f"{self.path}: the checkpoint after batch {batch} comes from {store.url}")
                    break
            except UserError as error:
                log.warning("the checkpoint after batch %d in %s is passed over: %s", batch, store.url, error)
                failed = error
        else:
            if failed is not None:
                raise failed
            batch = -1
        if not shared and self.checkpoints.is_dir():
            folder = CheckpointFolder(self.checkpoints)
            newer = [path for path in folder.by_age() if batch_of(path) > batch]
            if newer and batch < 0:
                raise UserError(
                    f"{store.url} has no checkpoint, and {newer[0]} is only on this machine, which does not share "
                    "the folder with others: copy it to all of them, or pass run.overwrite=true to begin anew"
                )
            for path in newer:
                folder.set_aside(path)

    def _check_same(self, store: Store, names: list[str]) -> None:
        """Raise ``UserError`` if a store has the files of another run."""
        mine = self.checkpoints / "manifest.json"
        theirs = "checkpoints/manifest.json"
        if theirs not in names or not mine.is_file():
            return
        with tempfile.TemporaryDirectory() as folder:
            store.get(theirs, Path(folder) / "manifest.json")
            if read_json(Path(folder) / "manifest.json") != read_json(mine):
                raise UserError(
                    f"{store.url} holds checkpoints of another run than {self.path}: choose another checkpoint.remote, "
                    "or another run.folder"
                )

    def _fetch_checkpoint(self, store: Store, records: list[str], names: list[str]) -> bool:
        """Copy one checkpoint, unless a rank's part is missing in the store; equal local files are not copied again."""
        files: dict[str, Any] = {}
        ranks: set[Any] = set()
        with tempfile.TemporaryDirectory() as folder:
            for name in records:
                place = Path(folder) / Path(name).name
                store.get(name, place)
                found = read_record(place)
                files, ranks = files | found["files"], ranks | {found["ranks"]}
        if ranks != {len(records)}:
            return False
        rest = [name for name in names if not name.startswith(("checkpoints/ba", f"checkpoints/{LATEST}"))]
        for name in sorted(rest, key=lambda name: name != self.config.name):  # the file that marks a run comes first
            self._get(store, name)
        for name in records:
            self._get(store, name)
        for name in sorted(files, key=lambda name: name.endswith(METADATA)):  # the mark of completion comes last
            place = inside(self.checkpoints, name)
            if not place.is_file() or describe_file(place) != files[name]:
                self._get(store, f"checkpoints/{name}")
        compare_checksums(self.checkpoints, files)
        return True

    def _get(self, store: Store, name: str) -> None:
        place = inside(self.path, name)
        part = temporary_for(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            store.get(name, part)
            os.replace(part, place)
        finally:
            remove(part)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Reserve the folder for this job's ranks while the ``with`` block runs.

        Raises:
            UserError: on all ranks, if another process uses the folder, or if llmprune did not make its contents.
        """
        with ExitStack() as stack:
            on_rank_zero(lambda: stack.enter_context(working_folder(self.path)) and None)
            if dist.get_global_rank() == 0:
                stack.enter_context(logged_in(self.path))
            yield

    def find(self, *, overwrite: bool, autoresume: bool) -> Path | None:
        """Check whether the folder may be used; nothing is changed.

        Returns:
            The checkpoint to resume from, if any.

        Raises:
            UserError: llmprune did not make the folder's contents; the folder has a run and neither ``overwrite`` nor
                ``autoresume`` is set; or its checkpoints can't be used and ``overwrite`` is not set.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run.folder {self.path} is a file: choose another folder")
        refuse_deleting(self.path)
        if is_empty(self.path):
            return None
        if autoresume:
            checkpoints = CheckpointFolder(self.checkpoints)
            found = checkpoints.newest(contents=True, careful=not overwrite)
            if found is not None:
                log.info("the run resumes from %s", found)
                return found
            if not overwrite and not self.checkpoints.is_dir():  # every run has this folder from the start
                raise UserError(f"{self.path} holds something that is no training run: choose another run.folder")
            if checkpoints.by_age():
                print(f"{self.path} has no checkpoint that can be used; with run.overwrite the run begins anew")
            elif self.config.exists():
                print(f"{self.path} holds no complete checkpoint to resume from: the run begins anew")
            return None
        if not overwrite and self.config.exists():
            raise UserError(
                f"{self.path} holds a run already: pass run.autoresume=true to resume it, "
                "run.overwrite=true to delete it, or another run.folder"
            )
        if not overwrite:
            raise UserError(f"{self.path} holds something that is no run: choose another run.folder")
        return None

    def create(self) -> None:
        """Make the folder, empty except for llmprune's mark; existing contents are deleted.

        Raises:
            UserError: llmprune did not make the existing contents, or the folder can't be written.
        """
        clear(self.path)
        try:
            self.checkpoints.mkdir()
        except OSError as error:
            raise UserError(f"can't write to {self.path}: {error.strerror}") from None


@dataclass
class Manifest:
    """``manifest.json``: description of a folder of checkpoints.

    Attributes:
        family: name of the model's family.
        source: model that the run started from (folder, hub name, or "random").
        data: path of the data folder, the hash of its tokenizer and the hash of its manifest.
        seed: seed of the run.
        versions: versions of Python and of the most important packages.
        git_commit: commit of llmprune's git checkout; None = it is no checkout.
        sections: settings of every section of the YAML, by section name, as the section records them.
    """

    family: str
    source: str
    data: dict[str, str]
    seed: int
    versions: dict[str, str]
    git_commit: str | None
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    schema: int = 1

    def section(self, settings: type[S]) -> S | None:
        """The settings of the section with this settings class; ``None`` = the run did not have the section."""
        names = (name for name, section in all_sections().items() if section.settings is settings)
        recorded = next((self.sections[name] for name in names if name in self.sections), None)
        return None if recorded is None else settings_from(settings, recorded)

    def save(
        self,
        checkpoints: Path,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        source: Path | None,
    ) -> None:
        """Write the manifest and, in the same folder, the files that an exported model needs.

        Args:
            checkpoints: folder of the checkpoints.
            config: Hugging Face config of the model.
            tokenizer: tokenizer of the run.
            source: folder of the model, whose generation config is copied; None = the model began with random weights.
        """
        with output_folder(checkpoints / "model", overwrite=True) as folder:
            save_model_config(copy.deepcopy(config), folder)
            if source is not None and (source / GENERATION).is_file():
                (folder / GENERATION).write_bytes((source / GENERATION).read_bytes())
            tokenizer.save_pretrained(folder)
            name_inputs(folder)
            record(folder)
        write_json(checkpoints / "manifest.json", asdict(self))

    @classmethod
    def load(cls, checkpoints: Path) -> "Manifest":
        """Read the manifest of a folder of checkpoints.

        Raises:
            UserError: there is no manifest, or it is damaged.
        """
        path = checkpoints / "manifest.json"
        if not path.is_file():
            raise UserError(f"{checkpoints} has no manifest.json: it holds no checkpoints of llmprune")
        try:
            values = dict(read_json(path))
            for name, section in dict(values.get("sections", {})).items():
                if name not in all_sections():
                    raise UserError(f"{path} has the section '{name}', which no installed package has")
                values["sections"][name] = asdict(settings_from(all_sections()[name].settings, section))
            manifest = settings_from(cls, values)
        except (TypeError, ValueError, OmegaConfBaseException) as error:
            raise UserError(f"{path} is no manifest of this version ({first_line(error)})") from None
        if manifest.schema != cls.schema:
            raise UserError(f"{path} has schema {manifest.schema}; this version reads {cls.schema}")
        return manifest


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect a run's results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the git checkout that this code runs from; a trailing + marks uncommitted changes."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def fetch_run(run: RunFolder, store: Store) -> None:
    """Copy a run's newest checkpoint to rank 0's machine, and to all other machines that do not share its folder.

    Raises:
        UserError: on all ranks, if a machine could not get the checkpoint, or the folder has something else.
    """
    mark = on_rank_zero(lambda: temporary_for(run.path / "seen"))

    def leave_mark() -> None:
        refuse_deleting(run.path)
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            if is_empty(run.path):
                mark_folder(run.path)
            mark.touch()
        except OSError as error:
            raise UserError(f"can't write to {run.path}: {error.strerror}") from None

    on_rank_zero(leave_mark)
    seen = mark.exists()
    shared = all(dist.all_gather_object(seen))
    failed = ""
    try:
        if dist.get_global_rank() == 0 or (dist.get_local_rank() == 0 and not seen):
            run.fetch(store, shared=shared)
    except UserError as error:
        failed = str(error)
    reasons = [reason for reason in dist.all_gather_object(failed) if reason]
    on_rank_zero(lambda: remove(mark))
    if reasons:
        raise UserError(reasons[0])


def check_unused(store: Store) -> None:
    """Raise ``UserError`` if a store already has a run: a new run must not mix with it."""
    if store.names("checkpoints/"):
        raise UserError(
            f"{store.url} holds a run's checkpoints already: pass run.autoresume=true to resume it, or another "
            "checkpoint.remote"
        )
