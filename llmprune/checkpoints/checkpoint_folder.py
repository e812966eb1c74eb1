"""The folder of a run's checkpoints: find those that are complete and undamaged, and delete old ones."""

import logging
import os
import re
import secrets
import sys
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.utils.checksums import NewerRecord, compare_checksums, read_record
from llmprune.utils.errors import UserError
from llmprune.utils.locks import is_held, locked
from llmprune.utils.outputs import remove

LATEST = "latest-rank0.pt"  # Composer's link to the newest checkpoint
METADATA = ".metadata"  # file that marks a folder as a sharded checkpoint; it is written last
READERS = 8  # number of files that are read in parallel to compare checksums
BEST = "best.safetensors"  # weights that trained beside a frozen model, at the lowest held-out loss
_TAIL = 2**16  # bytes at the end of a file that contain the end of its table of contents
_ASIDE = "unusable"  # folder for checkpoints that were complete once and can no longer be used
_NAME = re.compile(r"ba(\d+)(-rank0\.pt)?$")
_PART = re.compile(r"__(\d+)_\d+\.distcp$")
_RECORD = re.compile(r"ba(\d+)\.sums-\d+\.json$")

log = logging.getLogger(__name__)


def batch_of(checkpoint: Path) -> int:
    """Number of batches trained before a checkpoint was written; -1 if its name does not contain it."""
    name = _NAME.match(checkpoint.name)
    return int(name[1]) if name else -1


def record_name(batch: int, rank: int) -> str:
    """Name of the file with the checksums of a rank's part of a checkpoint.

    The file contains {"schema": 1, "ranks": number of ranks that have a part, "files": see
    ``checksums.describe_file``}; file names are relative to the folder of checkpoints.
    """
    return f"ba{batch}.sums-{rank}.json"


def records_in(names: Iterable[str]) -> dict[int, list[str]]:
    """The records among ``names``, by the batch of their checkpoint, the newest first."""
    found: dict[int, list[str]] = {}
    for name in names:
        if match := _RECORD.search(name):
            found.setdefault(int(match[1]), []).append(name)
    return dict(sorted(found.items(), reverse=True))


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has the part that is written last: a folder's metadata, or a file's table of contents.

    Raises:
        OSError: the checkpoint can't be read.
    """
    if checkpoint.is_dir():
        return (checkpoint / METADATA).is_file()
    with checkpoint.open("rb") as file:
        file.seek(-min(checkpoint.stat().st_size, _TAIL), os.SEEK_END)
        file.read()  # raises if it can't be read; zipfile would only report that it is no zip file
        return zipfile.is_zipfile(file)


def _unusable(folder: Path, why: str) -> UserError:
    return UserError(
        f"{folder} holds checkpoints, but {why}: bring it in order and try again, or pass run.overwrite=true to delete "
        "them all and begin anew"
    )


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of a run.

    Attributes:
        path: path of the folder.
    """

    path: Path

    def latest(self, *, contents: bool = False) -> Path | None:
        """The newest complete checkpoint, if there is one; see ``newest``."""
        return self.newest(contents=contents, careful=False)

    def newest(self, *, contents: bool, careful: bool) -> Path | None:
        """The newest complete checkpoint, if there is one.

        Composer removes its link to the newest checkpoint before it makes the next link: after a kill between the two,
        the newest checkpoint is found by name. A damaged or incomplete checkpoint is skipped with a warning that names
        it.

        Args:
            contents: whether the files' contents are compared with their checksums; otherwise only sizes are compared.
            careful: whether it is an error if there are checkpoints but none can be used, or if a newer one can't be
                read now but may be readable later.

        Raises:
            UserError: see ``careful``.
        """
        linked = self.path / LATEST
        first = [linked.resolve()] if linked.exists() else []
        passed_over = ""
        for path in [*first, *(other for other in self.by_age() if other.resolve() not in first)]:
            try:
                if not is_complete(path):
                    raise UserError("it was not written to its end, or is being copied")
                self.check_whole(path, contents=contents)
                return path
            except (UserError, OSError) as error:
                if careful and isinstance(error, OSError | NewerRecord):
                    raise _unusable(self.path, f"{path.name} can't be read now ({error})") from None
                if self._writing(batch_of(path)).exists():
                    log.warning("%s is passed over: the run ended while it was written", path)
                    continue
                passed_over = passed_over or f"{path.name} can't be used ({error})"
                log.warning("%s is passed over: %s", path, error)
        if careful and passed_over:
            raise _unusable(self.path, passed_over)
        return None

    def by_age(self) -> list[Path]:
        """All checkpoints, complete or not, the newest first."""
        found = (path for path in self.path.glob("ba*") if _NAME.match(path.name))
        return sorted(found, key=batch_of, reverse=True)

    def note_writing(self, batch: int) -> None:
        """Create the file that marks a checkpoint as being written."""
        self._writing(batch).touch()

    def note_written(self, batch: int) -> None:
        """Delete the file that marks a checkpoint as being written."""
        self._writing(batch).unlink(missing_ok=True)

    def _writing(self, batch: int) -> Path:
        return self.path / f"ba{batch}.writing"

    @contextmanager
    def reading(self, batch: int) -> Iterator[None]:
        """Prevent the run that wrote a checkpoint from deleting it while the ``with`` block reads it.

        If the folder is not writable, there is no such protection.
        """
        with ExitStack() as stack:
            with suppress(UserError):
                stack.enter_context(locked(self.path / f".ba{batch}.{secrets.token_hex(4)}.lock", self.path))
            yield

    def is_read(self, batch: int) -> bool:
        """Whether another process is reading a checkpoint."""
        return any(is_held(file) for file in self.path.glob(f".ba{batch}.????????.lock"))

    def own_files(self, batch: int, rank: int) -> list[Path]:
        """Files of a checkpoint that a rank wrote; the file that marks it as complete is last."""
        folder = self.path / f"ba{batch}"
        if not folder.is_dir():
            whole = self.path / f"ba{batch}-rank0.pt"
            return [whole] if rank == 0 and whole.is_file() else []
        metadata = [folder / METADATA] if rank == 0 else []
        return [path for path in [*sorted(folder.glob(f"__{rank}_*.distcp")), *metadata] if path.is_file()]

    def ranks_of(self, batch: int) -> set[int]:
        """The ranks whose part of a sharded checkpoint is in this folder."""
        names = (path.name for path in (self.path / f"ba{batch}").glob("__*_*.distcp"))
        return {int(match[1]) for name in names if (match := _PART.match(name))}

    def check_whole(self, checkpoint: Path, *, contents: bool) -> None:
        """Compare a checkpoint with the checksums of its parts, if these were written.

        Args:
            checkpoint: checkpoint in this folder.
            contents: whether the files' contents are compared; otherwise only sizes are compared.

        Raises:
            UserError: a part is missing or differs.
        """
        files: dict[str, Any] = {}
        for record in self.path.glob(f"ba{batch_of(checkpoint)}.sums-*.json"):
            files |= read_record(record)["files"]
        with ThreadPoolExecutor(READERS) as readers:
            parts = [{name: files[name]} for name in sorted(files)]
            for _ in readers.map(lambda part: compare_checksums(self.path, part, contents=contents), parts):
                pass

    def keep(self, newest: int, resumed: Path | None = None) -> None:
        """Delete all but the newest complete checkpoints (-1 = keep all), and incomplete files of a killed process.

        Without this, checkpoints of earlier processes would accumulate when a run is resumed often. A checkpoint that
        is newer than the resumed one, and was complete once, is moved to the folder ``unusable``. A checkpoint that
        another process reads is kept, and so is the one before a checkpoint without checksums.

        Args:
            newest: number of checkpoints to keep.
            resumed: checkpoint that the run resumes from; newer checkpoints could not be used.
        """
        resumed = resumed or self.latest()
        last = sys.maxsize if resumed is None else batch_of(resumed)
        complete = [path for path in self.by_age() if batch_of(path) <= last and is_complete(path)]
        spare = int(self._writing(last).exists())  # 1 if its checksums were never written: it may be damaged
        kept = {last, *(batch_of(path) for path in (complete if newest < 0 else complete[: newest + spare]))}
        for path in self.by_age():
            batch = batch_of(path)
            if batch > last and not self._writing(batch).exists():
                self.set_aside(path)
            elif batch not in kept and self.is_read(batch):
                kept.add(batch)
            elif batch not in kept or not is_complete(path):
                remove(path)
                log.info("%s is deleted", path)
        for batch, records in records_in(path.name for path in self.path.iterdir()).items():
            if batch not in kept:
                for record in records:
                    remove(self.path / record)
        for note in self.path.glob("ba*.writing"):
            remove(note)
        for lock in self.path.glob(".ba*.lock"):
            if not is_held(lock):
                remove(lock)

    def set_aside(self, checkpoint: Path) -> None:
        """Move a checkpoint with its records to the folder ``unusable``; it was complete once, so it is not deleted."""
        aside = self.path / _ASIDE
        aside.mkdir(exist_ok=True)
        for path in [checkpoint, *self.path.glob(f"ba{batch_of(checkpoint)}.sums-*.json")]:
            remove(aside / path.name)
            path.rename(aside / path.name)
        log.warning("%s, which can't be used, is moved to %s", checkpoint, aside)
