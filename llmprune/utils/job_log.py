"""The log of a job: llmprune's messages, written to a file in the job's folder."""

import logging
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmprune.utils.logs import FORM, is_shown
from llmprune.utils.outputs import LOG, is_begun

_WAITING = 1000  # largest number of lines that wait in memory


@contextmanager
def logged_in(folder: Path) -> Iterator[None]:
    """Append llmprune's log lines, level INFO and above, to a job's ``log.txt`` while the ``with`` block runs.

    This has an effect only in a command: a program that imports llmprune handles the log lines itself.

    Args:
        folder: job's folder, which this process has claimed.
    """
    logger = logging.getLogger("llmprune")
    if not is_shown(logger):
        yield
        return
    kept, level = _Kept(folder), logger.level
    logger.addHandler(kept)
    logger.setLevel(min(level, logging.INFO))
    try:
        yield
    finally:
        logger.removeHandler(kept)
        logger.setLevel(level)


class _Kept(logging.Handler):
    """Appends log lines to a file in a job's folder.

    Lines wait in memory until the job has changed its folder, because the job may still be refused. A job that begins
    anew deletes the folder's contents; the new file then begins with all lines of this job. An error in writing the
    file does not end the job.
    """

    def __init__(self, folder: Path) -> None:
        """Prepare the handler; no file is written yet."""
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter(FORM, "%Y-%m-%d %H:%M:%S"))
        self._folder, self._process = folder, os.getpid()
        self._lines: deque[str] = deque(maxlen=_WAITING)
        self._untouched = self._state()
        self._began = False

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, or keep it until the job has changed its folder."""
        try:
            line = f"{self.format(record)}\n"
        except Exception:  # a line that can't be made ends no job
            self.handleError(record)
            return
        own = os.getpid() == self._process  # otherwise a forked worker, which has a copy of the waiting lines
        if own:
            self._lines.append(line)
        with suppress(OSError):
            if not is_begun(self._folder) or not (self._began or self._state() != self._untouched):
                return
            with (self._folder / LOG).open("a", encoding="utf-8", errors="backslashreplace") as file:
                whole = own and (not self._began or file.tell() == 0)
                file.write("".join(self._lines) if whole else line)
            self._began |= own

    def _state(self) -> tuple[int, list[str]]:
        """The folder's modification time (which is coarse) and file names; they change with the folder's contents."""
        return self._folder.stat().st_mtime_ns, sorted(os.listdir(self._folder))
