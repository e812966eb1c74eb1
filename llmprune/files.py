"""Files and folders that appear whole or not at all."""

import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from llmprune.errors import UserError


def inside(folder: Path, name: object) -> Path:
    """The place of a file that some record names, below a folder.

    Raises:
        UserError: the name leads out of the folder, or is none.
    """
    path = PurePosixPath(name if isinstance(name, str) else "")
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in str(name) or "\\" in str(name):
        raise UserError(f"'{name}' is no name of a file in {folder}: whoever made its record is not to be trusted")
    return folder / str(name)


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
