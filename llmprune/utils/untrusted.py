"""Checks of folders from other people, before anything in them is used."""

import os
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llmprune.utils.errors import UserError

_POINTER = b"version https://git-lfs"
_POINTER_BYTES = 1024  # largest size of a Git LFS pointer
_DEPTH = 2  # depth of a model's folders that are checked


def inspect(folder: Path) -> None:
    """Check the files of a model or tokenizer.

    Raises:
        UserError: a file is a link out of the folder (other than into the hub's own cache), or a Git LFS pointer.
    """
    root = folder.resolve()
    allowed = [root, Path(constants.HF_HUB_CACHE).resolve()]
    if root.parent.name == "snapshots":  # a snapshot in a copied cache
        allowed.append(root.parent.parent / "blobs")
    for path in _entries(root, _DEPTH):
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            if not any(target == place or place in target.parents for place in allowed):
                raise UserError(f"{path} is a link out of {folder}, which is not followed: put the file itself there")
        if path.is_file() and path.stat().st_size < _POINTER_BYTES and path.read_bytes().startswith(_POINTER):
            raise UserError(f"{path} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")


def _entries(folder: Path, depth: int) -> Iterator[Path]:
    """Yield everything in a folder and its subfolders, except in hidden folders."""
    for path in sorted(folder.iterdir()):
        yield path
        if depth > 1 and path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from _entries(path, depth - 1)


def open_tokenizer(place: Path | str) -> PreTrainedTokenizerBase:
    """Open a tokenizer from a folder or the hub; code in its folder is never run.

    Raises:
        UserError: see ``inspect``.
        OSError, ValueError, TypeError: Transformers' own exceptions, if it can use no tokenizer there.
    """
    if Path(place).is_dir():
        inspect(Path(place))
    return AutoTokenizer.from_pretrained(str(place), trust_remote_code=False)
