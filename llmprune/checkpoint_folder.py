"""The folder of a run's checkpoints: which are there, complete and undamaged."""

import logging
import re
import sys
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.checksums import compare, read_record
from llmprune.errors import UserError
from llmprune.files import remove

LATEST = "latest-rank0.pt"  # Composer's link to the newest
METADATA = ".metadata"  # marks a folder as a sharded checkpoint, and is written last
READERS = 8  # files that are read at once to compare checksums
_NAME = re.compile(r"ba(\d+)(-rank0\.pt)?$")
_PART = re.compile(r"__(\d+)_\d+\.distcp$")
_RECORD = re.compile(r"ba(\d+)\.sums-\d+\.json$")

log = logging.getLogger(__name__)


def batch_of(checkpoint: Path) -> int:
    """How many batches had been trained on when a checkpoint was written; -1 if its name does not say."""
    name = _NAME.match(checkpoint.name)
    return int(name[1]) if name else -1


def record_name(batch: int, rank: int) -> str:
    """The file with the checksums of a rank's part of a checkpoint.

    It holds {"schema": 1, "ranks": how many have a part, "files": see ``checksums.describe``}, names being relative to
    the folder of checkpoints.
    """
    return f"ba{batch}.sums-{rank}.json"


def records_in(names: Iterable[str]) -> dict[int, list[str]]:
    """The records among ``names`` by the batch of their checkpoint, the newest first."""
    found: dict[int, list[str]] = {}
    for name in names:
        if match := _RECORD.search(name):
            found.setdefault(int(match[1]), []).append(name)
    return dict(sorted(found.items(), reverse=True))


def is_complete(checkpoint: Path) -> bool:
    """Whether the part that is written last is there: a folder's metadata, a file's table of contents."""
    return (checkpoint / METADATA).is_file() or zipfile.is_zipfile(checkpoint)


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of a run.

    Attributes:
        path: of the folder.
    """

    path: Path

    def latest(self, *, contents: bool = False) -> Path | None:
        """The newest complete checkpoint, if there is one.

        Composer removes its link to it before it makes the next: after a kill in between, the newest is looked for.
        One that is damaged or was cut off is passed over, and named.

        Args:
            contents: whether its files are compared with their checksums; otherwise sizes alone.
        """
        linked = self.path / LATEST
        first = [linked.resolve()] if linked.exists() else []
        for path in [*first, *(other for other in self.by_age() if other.resolve() not in first)]:
            try:
                if not is_complete(path):
                    raise UserError("it was not written to its end")
                self.check(path, contents=contents)
                return path
            except (UserError, OSError) as error:
                log.warning("%s is passed over: %s", path, error)
        return None

    def by_age(self) -> list[Path]:
        """All checkpoints, complete or not, the newest first."""
        found = (path for path in self.path.glob("ba*") if _NAME.match(path.name))
        return sorted(found, key=batch_of, reverse=True)

    def own_files(self, batch: int, rank: int) -> list[Path]:
        """What a rank wrote of a checkpoint; what marks it as complete comes last."""
        folder = self.path / f"ba{batch}"
        if not folder.is_dir():
            whole = self.path / f"ba{batch}-rank0.pt"
            return [whole] if rank == 0 and whole.is_file() else []
        metadata = [folder / METADATA] if rank == 0 else []
        return [path for path in [*sorted(folder.glob(f"__{rank}_*.distcp")), *metadata] if path.is_file()]

    def ranks_of(self, batch: int) -> set[int]:
        """The ranks that have a part of a sharded checkpoint here."""
        names = (path.name for path in (self.path / f"ba{batch}").glob("__*_*.distcp"))
        return {int(match[1]) for name in names if (match := _PART.match(name))}

    def check(self, checkpoint: Path, *, contents: bool) -> None:
        """Compare a checkpoint with the checksums of its parts, as far as these were written.

        Args:
            checkpoint: one of this folder's.
            contents: whether to read the files; otherwise sizes are compared alone.

        Raises:
            UserError: a part is missing or is another one.
        """
        files: dict[str, Any] = {}
        for record in self.path.glob(f"ba{batch_of(checkpoint)}.sums-*.json"):
            files |= read_record(record)["files"]
        with ThreadPoolExecutor(READERS) as readers:
            parts = [{name: files[name]} for name in sorted(files)]
            for _ in readers.map(lambda part: compare(self.path, part, contents=contents), parts):
                pass

    def keep(self, newest: int, resumed: Path | None = None) -> None:
        """Delete all but the newest complete checkpoints (-1 = none of them), and what a kill left of others.

        Those of earlier processes would pile up where a run is resumed often.

        Args:
            newest: how many are kept.
            resumed: the one that the run goes on from; what is newer could not be used.
        """
        resumed = resumed or self.latest()
        last = sys.maxsize if resumed is None else batch_of(resumed)
        complete = [path for path in self.by_age() if is_complete(path) and batch_of(path) <= last]
        kept = {last, *(batch_of(path) for path in (complete if newest < 0 else complete[:newest]))}
        for path in self.by_age():
            if batch_of(path) not in kept or not is_complete(path):
                remove(path)
        for batch, records in records_in(path.name for path in self.path.iterdir()).items():
            if batch not in kept:
                for record in records:
                    remove(self.path / record)
