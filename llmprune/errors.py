"""The one exception for mistakes that the user can mend."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user asked for: shown as one line, without a traceback, exit code 2.

    The message says what is wrong and what to do about it. Errors that can only be our own are raised as anything else
    and keep their traceback.
    """

    def __init__(self, message: str) -> None:
        """Keep the message; of one from a loader worker, which PyTorch wraps in a traceback, what the worker said."""
        if message.startswith("Caught UserError in DataLoader worker"):
            message = message.rpartition("UserError: ")[2].strip()
        super().__init__(message)


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt ``name``: the nearest valid one, or the list of them all."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(valid)}"


def first_line(error: Exception) -> str:
    """The first line of a message, shortened; of a list of faults, its heading with the first of them."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line if len(line) <= 300 else line[:300] + "…"
