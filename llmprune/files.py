"""Files and folders that appear whole or not at all."""

import glob
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from llmprune.errors import UserError


def refuse_replacing(out: Path | str, inputs: Iterable[Path | str]) -> None:
    """Raise ``UserError`` if ``out`` is one of ``inputs`` or holds one: replacing it would delete what is read."""
    target = Path(out).resolve()
    for path in inputs:
        place = Path(path).resolve()
        if target == place or target in place.parents:
            raise UserError(f"writing {out} would delete the input {path}: choose another --out")


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise ``UserError`` if something stands at ``path`` and may not be overwritten."""
    path = path.resolve()
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: choose another place, or pass --overwrite")
    if overwrite and path.is_dir() and (path / ".git").exists():
        raise UserError(f"{path} is a git checkout; it is not overwritten")


def check_output(path: Path | str, suffix: str, overwrite: bool) -> None:
    """Check, before any work, that a file can be written; its folder is made.

    Raises:
        UserError: something stands at ``path``, its name does not end in ``suffix``, or its folder can't be made.
    """
    path = Path(path)
    refuse_existing(path, overwrite)
    if path.suffix != suffix or path.is_dir():
        raise UserError(f"{path} must be a file whose name ends in {suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from None


@contextmanager
def output_folder(path: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that takes its place once the block ends well.

    An error inside the block removes the temporary folder and leaves ``path`` as it was.

    Raises:
        UserError: ``path`` exists and ``overwrite`` is false, or its parent can't be written.
    """
    path = Path(path).resolve()
    refuse_existing(path, overwrite)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"can't write beside {path}: {error.strerror}") from error
    try:
        yield temporary
        put_in_place(temporary, path, overwrite)
    finally:
        remove(temporary)


def put_in_place(folder: Path, path: Path, overwrite: bool = False) -> None:
    """Give a finished folder its name; what stands there is deleted.

    Raises:
        UserError: something has come to stand there, and may not be overwritten.
    """
    refuse_existing(path, overwrite)
    if path.exists():
        discarded = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
        try:
            path.rename(discarded)
            folder.rename(path)
        except BaseException:  # also a signal's
            if not path.exists():
                discarded.rename(path)
            raise
    else:
        folder.rename(path)
    for discarded in path.parent.glob(f".{glob.escape(path.name)}.????????.old"):
        remove(discarded)  # also what a killed process left


def inside(folder: Path, name: object) -> Path:
    """The place of a file that some record names, below a folder.

    Raises:
        UserError: the name leads out of the folder, or is none.
    """
    path = PurePosixPath(name if isinstance(name, str) else "")
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in str(name) or "\\" in str(name):
        raise UserError(f"'{name}' is no name of a file in {folder}: whoever made its record is not to be trusted")
    return folder / str(name)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether something is what a killed process was about to write or to delete."""
    return path.name.startswith(".") and path.suffix in (".tmp", ".old")


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(value: Any) -> str:
    """``value`` as JSON; what is no finite number becomes null, since JSON has no word for it."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON with every list of plain values on one line, atomically; see ``to_json``."""
    write_text(path, _indented(_finite(value), "\n") + "\n")


def _indented(value: Any, newline: str) -> str:
    inner = newline + "  "
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(str(key))}: {_indented(item, inner)}" for key, item in value.items()]
        return "{" + inner + ("," + inner).join(items) + newline + "}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "[" + inner + ("," + inner).join(_indented(item, inner) for item in value) + newline + "]"
    return json.dumps(value, allow_nan=False)


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, readable as far as the umask allows (the library alone makes it private)."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=dict(metadata or {}))
    make_readable(path)


def make_readable(path: Path | str) -> None:
    """Let everyone read a file, as far as the umask allows."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): restore it or make it anew") from None


def sha256_text(text: str) -> str:
    """Hexadecimal SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()
