"""Files and folders that appear completely or not at all."""

import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from llmprune.utils.errors import UserError

JSON_LIMIT = 2**29  # bytes; scores of every unit of the largest models need a quarter of it
_DIGITS = 300  # largest number of digits of a whole number; a float can't hold a number with more


def inside(folder: Path, name: object) -> Path:
    """The path below a folder of a file that a record names.

    Raises:
        UserError: the name is empty, or its path is outside the folder.
    """
    path = PurePosixPath(name if isinstance(name, str) else "")
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in str(name) or "\\" in str(name):
        raise UserError(f"'{name}' is no name of a file in {folder}: whoever made its record is not to be trusted")
    return folder / str(name)


def temporary_for(path: Path, ending: str = "tmp") -> Path:
    """A new name beside ``path`` for an unfinished file or one to be deleted; only llmprune uses such names."""
    return path.with_name(f".{path.name}.llmprune-{secrets.token_hex(4)}.{ending}")


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new file, never a part of it."""
    path = Path(path)
    temporary = temporary_for(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(value: Any) -> str:
    """``value`` as JSON; NaN and infinite numbers become null, because JSON can't express them."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically, with every list of plain values on one line; see ``to_json``."""
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
    """Make a file readable for everyone, as far as the umask allows."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def read_bytes(path: Path | str, limit: int) -> bytes:
    """Read a file of at most ``limit`` bytes.

    Raises:
        UserError: it does not exist, is a folder, a pipe or a device, is larger, or can't be read.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # do not wait for the writer of a pipe
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path} is no file but a folder, a pipe or a device: name a file")
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # ValueError: the name contains NUL
        raise UserError(f"{path!s:.300} can't be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > limit:
        raise UserError(
            f"{path} has more than {limit:,} bytes, the most that is read of such a file: is it the right one?"
        )
    return content


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """Parse a JSON text.

    Args:
        text: JSON text, as a string or as UTF-8 bytes.
        finite: whether NaN and infinite numbers are refused; they are not JSON, but some programs write them.

    Raises:
        ValueError: it is not JSON, it is nested too deeply, or a number in it is too large.
    """
    hooks: dict[str, Any] = {"parse_constant": _no_number, "parse_float": _finite_number} if finite else {}
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text, parse_int=_whole_number, **hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _finite_number(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def _whole_number(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number has {len(text):,} digits")
    return int(text)


def read_json(path: Path | str) -> Any:
    """Read a JSON file of at most ``JSON_LIMIT`` bytes.

    Raises:
        UserError: the file is missing, is larger, or is not JSON.
    """
    content = read_bytes(path, JSON_LIMIT)
    try:
        return parse_json(content)
    except MemoryError:
        raise UserError(f"{path} holds more than fits in memory: is it the right file?") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): restore it or make it anew") from None


def sha256_text(text: str) -> str:
    """Hexadecimal SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()
