"""The log of a job: what llmprune says while it works, in a file in the job's folder."""

import logging
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmprune.utils.logs import FORM, is_shown
from llmprune.utils.outputs import LOG, is_begun

_WAITING = 1000  # lines that are held at most


@contextmanager
def logged_in(folder: Path) -> Iterator[None]:
    """Append llmprune's lines, from INFO on, to ``log.txt`` in a job's folder while the block runs.

    Only in a command: a program that imports llmprune decides itself what becomes of its lines.

    Args:
        folder: that this process has claimed.
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
    """Appends lines to a file in a job's folder.

    What comes before the job has changed anything in its folder waits until then: it may still be refused. A job that
    begins anew deletes what was there; then the file begins with all lines of this job. A file that can't be written
    ends no job.
    """

    def __init__(self, folder: Path) -> None:
        """Nothing is written yet."""
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter(FORM, "%Y-%m-%d %H:%M:%S"))
        self._folder, self._process = folder, os.getpid()
        self._lines: deque[str] = deque(maxlen=_WAITING)
        self._untouched = self._state()
        self._began = False

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        line = f"{self.format(record)}\n"
        own = os.getpid() == self._process  # else it is a worker's, which was forked with what waits here
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
        """What differs once something was made or deleted in the folder: its time, which is coarse, and the names."""
        return self._folder.stat().st_mtime_ns, sorted(os.listdir(self._folder))
