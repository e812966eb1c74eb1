"""A job that is divided into pieces, which any number of processes share, on one machine or on several.

Processes on several machines need a shared folder. A piece that a killed process had begun is done again.
"""

import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json, write_json

WAIT = 2.0  # seconds between two checks of other processes' progress


class SharedJob:
    """The hidden folder of a job, beside its output.

    FOLDER/
      job.json          description of the job: settings and inputs
      done/PIECE.json   a piece that is done, with what its work returned

    The rest of the folder is for the work. Names of pieces may have slashes.

    Attributes:
        folder: the folder.
        finished: whether other processes have finished the job, so that nothing is to be done.
    """

    def __init__(
        self,
        out: Path,
        kind: str,
        description: Mapping[str, Any],
        pieces: Sequence[str],
        finished: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make or open the folder of a job.

        Args:
            out: output of the job.
            kind: ending of the folder's name, one for each kind of job.
            description: settings and inputs; only a job with the same ones is continued.
            pieces: names of all pieces.
            finished: whether the output is complete already; then no folder is made.

        Raises:
            UserError: the folder can't be written, or it belongs to a job with another description.
        """
        out = out.resolve()
        self.folder = out.with_name(f".{out.name}.{kind}")
        self._pieces = pieces
        self._lock = self.folder.with_name(f"{self.folder.name}.lock")  # the output has another lock
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._lock):
                self.finished = finished()  # by a process that held the lock
                if not self.finished:
                    self._open(out, description)
            if self.finished:
                self._lock.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"can't write beside {out}: {error.strerror}") from None

    def _open(self, out: Path, description: Mapping[str, Any]) -> None:
        self.folder.mkdir(exist_ok=True)
        known = self.folder / "job.json"
        if known.is_file() and read_json(known) != json.loads(json.dumps(dict(description))):
            raise UserError(
                f"{self.folder} is what is left of a job with other settings or data: continue with those, or delete it"
            )
        write_json(known, dict(description))

    @property
    def is_open(self) -> bool:
        """Whether the job's folder still exists."""
        return (self.folder / "job.json").is_file()

    @property
    def is_done(self) -> bool:
        """Whether all pieces are done, so that they can be joined."""
        return len(self.done) == len(self._pieces)

    @property
    def done(self) -> list[str]:
        """The names of the pieces that are done."""
        return [piece for piece in self._pieces if self._note(piece).is_file()]

    def result(self, piece: str) -> Any:
        """What the work on a piece returned."""
        return read_json(self._note(piece))

    def work(self, do: Callable[[str], Any]) -> None:
        """Do pieces until this process and others have done all of them.

        Args:
            do: function that does the piece with a name, and returns a value for JSON.
        """
        while self.is_open and not self.is_done:
            if not self._do_some(do):
                time.sleep(WAIT)  # other processes work on the last pieces

    @contextmanager
    def finishing(self) -> Iterator[bool]:
        """Yield whether this process has to finish the job: to join its pieces. Then the folder is removed.

        One process at a time finishes; after it the others have nothing to do.
        """
        with FileLock(self._lock):
            mine = self.is_done
            yield mine
            if mine:
                ended = self.folder.with_suffix(f".{secrets.token_hex(4)}")
                self.folder.rename(ended)  # one rename, so that other processes see the folder complete or not at all
                shutil.rmtree(ended)
        self._lock.unlink(missing_ok=True)

    def _note(self, piece: str) -> Path:
        return self.folder / "done" / f"{piece}.json"

    def _do_some(self, do: Callable[[str], Any]) -> bool:
        """Do every piece that is neither done nor in work; returns whether there was one."""
        found = False
        for piece in self._pieces:
            note = self._note(piece)
            if note.is_file() or not self.is_open:
                continue
            try:
                with FileLock(self.folder / f"{piece.replace('/', '_')}.lock", timeout=0):
                    if self.is_open and not note.is_file():
                        result = do(piece)
                        note.parent.mkdir(parents=True, exist_ok=True)
                        write_json(note, result)
                        found = True
            except Timeout:
                continue
            except FileNotFoundError:
                if self.is_open:
                    raise
                return True  # another process has completed the job
        return found
