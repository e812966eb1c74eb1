"""The one exception for mistakes that the user can mend."""

import difflib
import errno
import os
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


class BrokenModelError(UserError):
    """Training has broken the model; it is raised on all ranks at once."""


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


_PATHS = {
    errno.ELOOP: "its symbolic links lead in a circle",
    errno.ENAMETOOLONG: "the name is longer than the file system takes",
    errno.EILSEQ: "the file system takes no such characters in a name",
    errno.ENOTDIR: "a file stands where a folder belongs",
    errno.EACCES: "permission denied",
    errno.EPERM: "the system does not permit it",
}


def path_error(error: BaseException) -> str | None:
    """What to tell the user about a path that can't be used; None = it is another error."""
    links: list[BaseException | None] = [error, error.__cause__, error.__context__]
    for link in filter(None, links):
        if isinstance(link, RuntimeError) and str(link).startswith("Symlink loop from"):  # pathlib's
            return _PATHS[errno.ELOOP]
        if isinstance(link, UnicodeEncodeError) and link.reason == "surrogates not allowed":
            return "a name of a file, or a text, holds what is not UTF-8: rename or mend it"
        if isinstance(link, OSError) and link.errno in _PATHS:
            where = "" if link.filename is None else f"{_printable(link.filename)}: "
            return f"{where}{_PATHS[link.errno]}"
    return None


def one_line(error: BaseException) -> str | None:
    """What to tell the user about an error in place of a traceback; None = it may be our own."""
    return str(error) if isinstance(error, UserError) else disk_error(error) or path_error(error)


def check_surroundings(arguments: Iterable[str]) -> None:
    """Check what no command can do without: a working directory, and arguments in UTF-8.

    Raises:
        UserError: it was deleted, or one is in another encoding.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"'{_printable(argument)}' is not UTF-8: rename the file or folder") from None
    try:
        os.getcwd()
    except OSError:
        raise UserError("the working directory is gone: cd to another one") from None


def _printable(name: object) -> str:
    """A name of a file, with bytes that are not UTF-8 written as numbers; of a long one, the beginning."""
    shown = os.fsencode(name).decode("utf-8", "backslashreplace") if isinstance(name, str | bytes) else str(name)
    return shown if len(shown) <= 200 else shown[:200] + "…"


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
