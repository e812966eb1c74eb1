"""Log lines on standard error, from a configurable level. This module is imported before all slow imports."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from llmprune.utils.errors import UserError, nearest

VARIABLE = "LLMPRUNE_LOG"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
FORM = "%(asctime)s %(name)s: %(message)s"
_LOGGERS = ("llmprune", "data_prep")

log = logging.getLogger(__name__)


class _Shown(logging.Handler):
    """Prints log lines to the current standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        try:
            line = self.format(record)
        except Exception:  # a line that can't be made ends no job
            self.handleError(record)
            return
        show(line)


def show(line: str) -> None:
    """Print a line on standard error; a closed pipe or a full disk ends no job."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def tell(line: str) -> None:
    """Log a line at INFO; it is printed on standard error even where INFO is not shown."""
    log.info("%s", line)
    if not any(isinstance(h, _Shown) and h.level <= logging.INFO for h in logging.getLogger(_LOGGERS[0]).handlers):
        show(line)


@contextmanager
def logs_shown() -> Iterator[None]:
    """Print log lines of llmprune and data_prep of the level in ``LLMPRUNE_LOG`` and above (default: WARNING).

    Raises:
        UserError: there is no such level.
    """
    name = os.environ.get(VARIABLE, "").upper() or "WARNING"
    if name not in LEVELS:
        raise UserError(f"{VARIABLE} is '{os.environ[VARIABLE]}'; {nearest(name, LEVELS)}")
    shown = _Shown(name)
    shown.setFormatter(logging.Formatter(FORM, "%H:%M:%S"))
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(shown)
        logger.setLevel(name)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(shown)
            logger.setLevel(level)


def is_shown(logger: logging.Logger) -> bool:
    """Whether a command is running, which shows its log lines, rather than a program that imports llmprune."""
    return any(isinstance(handler, _Shown) for handler in logger.handlers)
