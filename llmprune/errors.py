"""The one exception for mistakes that the user can mend."""

import difflib
import errno
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


_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "the file is larger than may be written there",
    errno.EROFS: "the disk can only be read",
    errno.EIO: "the disk fails",
}
# How PyTorch and safetensors, which write for themselves, say so.
_WRITERS = (
    "No space left on device", "(os error 27)", "(os error 28)", "(os error 122)", "PytorchStreamWriter failed",
    "inline_container.cc",
)  # fmt: skip


def disk_error(error: BaseException) -> str | None:
    """What to tell the user about an error that a disk which takes no more has led to; None = it is another one."""
    links: list[BaseException | None] = [error, error.__cause__, error.__context__]
    for link in filter(None, links):
        if "unable to resize file </torch_" in str(link):
            return "shared memory (/dev/shm) is full: give the container more of it (docker run --shm-size=8g)"
        reason = _DISK.get(link.errno or 0) if isinstance(link, OSError) else None
        if reason is None and any(words in str(link) for words in _WRITERS):
            reason = "the disk is full or takes no more"
        if reason is not None:
            name = getattr(link, "filename", None)
            where = f" ({name})" if name else ""
            return f"{reason}{where}: what was complete before stays; make room, and run the same again"
    return None


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
