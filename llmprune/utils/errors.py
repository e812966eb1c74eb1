"""The exception for mistakes that the user can correct, and texts for errors of disks and paths."""

import difflib
import errno
import os
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the user's input: shown as one line, without a traceback, exit code 2.

    The message gives the cause and the remedy. Errors that must be mistakes in llmprune are raised as other exceptions
    and keep their traceback.
    """

    def __init__(self, message: str) -> None:
        """Set the message; PyTorch's traceback around the message of a data loader's worker is removed."""
        if message.startswith("Caught UserError in DataLoader worker"):
            message = message.rpartition("UserError: ")[2].strip()
        super().__init__(message)


class BrokenModelError(UserError):
    """Training has made the model unusable; it is raised on all ranks at once."""


_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "the file is larger than may be written there",
    errno.EROFS: "the disk can only be read",
    errno.EIO: "the disk fails",
}
# Parts of messages of PyTorch and safetensors, which write files themselves, for a disk that accepts no more data.
_WRITERS = (
    "No space left on device", "(os error 27)", "(os error 28)", "(os error 122)", "PytorchStreamWriter failed",
    "inline_container.cc",
)  # fmt: skip


def disk_error(error: BaseException) -> str | None:
    """The text for the user about an error caused by a disk that accepts no more data; None = another error."""
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
    errno.ENOTDIR: "there is a file in place of a folder",
    errno.EACCES: "permission denied",
    errno.EPERM: "the system does not permit it",
}


def path_error(error: BaseException) -> str | None:
    """The text for the user about an error caused by a path that can't be used; None = another error."""
    links: list[BaseException | None] = [error, error.__cause__, error.__context__]
    for link in filter(None, links):
        if isinstance(link, RuntimeError) and str(link).startswith("Symlink loop from"):  # raised by pathlib
            return _PATHS[errno.ELOOP]
        if isinstance(link, UnicodeEncodeError) and link.reason == "surrogates not allowed":
            return "a name of a file, or a text, holds what is not UTF-8: rename or mend it"
        if isinstance(link, OSError) and link.errno in _PATHS:
            where = "" if link.filename is None else f"{_printable(link.filename)}: "
            return f"{where}{_PATHS[link.errno]}"
    return None


def one_line(error: BaseException) -> str | None:
    """The text for the user instead of a traceback; None = the error may be a mistake in llmprune."""
    return str(error) if isinstance(error, UserError) else disk_error(error) or path_error(error)


def check_surroundings(arguments: Iterable[str]) -> None:
    """Check that the working directory exists and that the arguments are UTF-8; every command needs this.

    Raises:
        UserError: the working directory was deleted, or an argument has another encoding.
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
    """A file name with bytes that are not UTF-8 written as numbers; a long name is cut to its beginning."""
    shown = os.fsencode(name).decode("utf-8", "backslashreplace") if isinstance(name, str | bytes) else str(name)
    return shown if len(shown) <= 200 else shown[:200] + "…"


def nearest(name: str, valid: Iterable[str]) -> str:
    """Hint for a misspelt ``name``: the most similar valid name, or the list of all valid names."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"valid: {', '.join(valid)}"


def first_line(error: Exception) -> str:
    """The first line of a message, shortened; a heading of a list is joined with the first item."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line if len(line) <= 300 else line[:300] + "…"
