"""Output folders and files of llmprune, which it may lock, replace and delete. Nothing else is ever deleted.

A folder belongs to llmprune if it contains ``MARK``, a file that llmprune writes into every folder that it makes. A
file is replaced only if the user names that file and asks for it.
"""

import atexit
import glob
import importlib.metadata
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from llmprune.utils.errors import UserError, first_line, path_error
from llmprune.utils.files import read_json, temporary_for, write_json
from llmprune.utils.locks import locked

MARK = ".llmprune"
LOCK = ".llmprune.lock"  # lock in the folder of a running job
LOG = "log.txt"  # log of a job; a folder with nothing else counts as empty
# Names from ``temporary_for``, and locks, also locks that filelock was taking over.
_LEFTOVER = re.compile(r"\..*(\.llmprune-[0-9a-f]{8}\.(tmp|old)|\.lock(\.(break|restore)\..*)?)")

_PROCESS = ExitStack()  # locks of outputs, held until this process ends
atexit.register(_PROCESS.close)


def mark(folder: Path) -> None:
    """Write the mark that llmprune made a folder."""
    write_json(folder / MARK, {"made_by": "llmprune", "version": importlib.metadata.version("llmprune")})


def is_ours(folder: Path) -> bool:
    """Whether llmprune made a folder."""
    try:
        found = read_json(folder / MARK)
    except UserError:
        return False
    return isinstance(found, dict) and found.get("made_by") == "llmprune"


def is_leftover(path: Path) -> bool:
    """Whether a path is a lock, or a temporary file or folder of a killed process."""
    return _LEFTOVER.fullmatch(path.name) is not None


def is_empty(folder: Path) -> bool:
    """Whether a folder contains nothing but leftovers, llmprune's mark and, if it has the mark, a log.

    A folder that does not exist counts as empty.
    """
    if not folder.is_dir():
        return True
    nothing = (MARK, LOG) if is_ours(folder) else (MARK,)
    return all(is_leftover(path) or path.name in nothing for path in folder.iterdir())


def is_begun(folder: Path) -> bool:
    """Whether llmprune made a folder and the folder is not empty."""
    return is_ours(folder) and not is_empty(folder)


def refuse_deleting(path: Path) -> None:
    """Raise ``UserError`` if ``path`` is a folder that llmprune did not make, or that has become a git checkout."""
    if not path.is_dir() or is_empty(path):
        return
    if not is_ours(path):
        raise UserError(
            f"{path} holds something that llmprune did not make (there is no file {MARK}), so it is neither used nor "
            "deleted: choose another place"
        )
    if (path / ".git").exists():
        raise UserError(f"{path} is a git checkout, so it is not deleted: choose another place")


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise ``UserError`` if ``path`` exists and may not be overwritten."""
    path = path.resolve()
    refuse_deleting(path)  # also with --overwrite
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: choose another place, or pass --overwrite")


def refuse_replacing(out: Path | str, inputs: Iterable[Path | str]) -> None:
    """Raise ``UserError`` if ``out`` is one of ``inputs`` or contains one: replacing it would delete the input."""
    target = Path(out).resolve()
    for path in inputs:
        place = Path(path).resolve()
        if target == place or target in place.parents:
            raise UserError(f"writing {out} would delete the input {path}: choose another --out")


def check_output(path: Path | str, suffix: str, overwrite: bool, beside: Iterable[Path] = ()) -> None:
    """Check, before any work, that a file can be written; make its folder, and lock the file for this process.

    Args:
        path: path of the file.
        suffix: required ending of the file's name.
        overwrite: whether the file may be replaced.
        beside: files that are written together with it; they may be replaced only if ``path`` exists too.

    Raises:
        UserError: the file exists, the name or folder is impossible, or another process is writing the file.
    """
    path = Path(path)
    try:
        known = path.exists()
        refuse_existing(path, overwrite)
        if path.suffix != suffix or path.is_dir():
            raise UserError(f"{path} must be a file whose name ends in {suffix}")
        for other in beside:
            if other.exists() and not (overwrite and known):
                raise UserError(f"{other} exists already and would be replaced with {path}: choose another place")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_for(path)  # the name that is used while writing
        temporary.touch(exist_ok=False)
        temporary.unlink()
        _PROCESS.enter_context(locked_output(path, shared=True))
    except (OSError, RuntimeError) as error:
        raise UserError(f"can't write {path!s:.300}: {path_error(error) or first_line(error)}") from None


@contextmanager
def locked_output(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Prevent other processes from making ``path`` while the ``with`` block runs; see ``locked``."""
    path = Path(os.path.abspath(path))
    with locked(path.with_name(f".{path.name}.lock"), path, shared=shared):
        yield


@contextmanager
def output_folder(path: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``, which replaces ``path`` when the ``with`` block ends without an error.

    An error inside the block removes the temporary folder and leaves ``path`` unchanged.

    Raises:
        UserError: ``path`` exists and may not be replaced, another process is making it, or its parent can't be
            written.
    """
    path = Path(path).resolve()
    refuse_existing(path, overwrite)
    temporary = temporary_for(path)
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_output(path))
            _remove_leftovers(path)
            temporary.mkdir()
        except OSError as error:
            raise UserError(f"can't write beside {path}: {error.strerror}") from error
        stack.callback(remove, temporary)
        yield temporary
        put_in_place(temporary, path, overwrite)


def put_in_place(folder: Path, path: Path, overwrite: bool = False) -> None:
    """Rename a finished folder to ``path``; an existing folder of this name is deleted.

    Raises:
        UserError: ``path`` exists by now and may not be overwritten.
    """
    refuse_existing(path, overwrite)
    mark(folder)
    if path.exists():
        discarded = temporary_for(path, "old")
        try:
            path.rename(discarded)
            folder.rename(path)
        except BaseException:  # also exceptions of signal handlers
            if not path.exists():
                discarded.rename(path)
            raise
    else:
        folder.rename(path)
    _remove_leftovers(path, "old")


@contextmanager
def working_folder(path: Path) -> Iterator[None]:
    """Make a folder and reserve it for this process while the ``with`` block runs.

    Raises:
        UserError: llmprune did not make its contents, another process uses it, or it can't be written.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"run.folder {path} is a file: choose another folder")
    refuse_deleting(path)
    known = path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't write to {path}: {error.strerror}") from None
    try:
        with locked(path / LOCK, path):
            yield
    finally:
        if not known:
            with suppress(OSError):  # the folder is not empty
                path.rmdir()


def clear(folder: Path) -> None:
    """Empty a folder that llmprune made, or make it; its mark is never absent, so a kill leaves it llmprune's.

    Raises:
        UserError: llmprune did not make it, or it can't be written.
    """
    refuse_deleting(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark(folder)
        for path in [*folder.iterdir()]:
            if path.name not in (MARK, LOCK):
                remove(path)
    except OSError as error:
        raise UserError(f"can't write to {folder}: {error.strerror}") from None


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_leftovers(path: Path, *suffixes: str) -> None:
    """Delete temporary files of killed processes beside ``path``, whose lock this process holds."""
    for suffix in suffixes or ("tmp", "old"):
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.llmprune-????????.{suffix}"):
            remove(leftover)
