"""Checksums of files: written when a folder is complete, compared on request."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune.utils.errors import UserError
from llmprune.utils.files import inside, read_json, write_json

CHECKSUMS = "checksums.json"
_HARMLESS = (".md", ".png", ".jpg", ".jpeg", ".svg", ".gif")


class NewerRecord(UserError):
    """A record of checksums that another version of llmprune wrote."""


class Verification:
    """Switch for this process: compare every folder with its checksums before it is loaded.

    Attributes:
        asked: whether the comparison was requested.
    """

    def __init__(self) -> None:
        """Start without a request."""
        self.asked = False
        self._seen: set[Path] = set()

    def look(self, folder: Path) -> None:
        """Compare a folder's files with its ``checksums.json`` if this was requested; at most once per folder.

        Raises:
            UserError: see ``verify_checksums``.
        """
        folder = folder.resolve()
        if self.asked and folder not in self._seen:
            verify_checksums(folder)
            self._seen.add(folder)


VERIFICATION = Verification()  # the switch of this process


def describe_file(path: Path) -> dict[str, Any]:
    """A file's size and hash, in the format of records: {"bytes": n, "sha256": hexadecimal}."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def record(folder: Path) -> None:
    """Write ``checksums.json`` with the checksums of all files in a folder and its subfolders."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    described = {path.relative_to(folder).as_posix(): describe_file(path) for path in files}
    write_json(folder / CHECKSUMS, {"schema": 1, "files": described})


def read_record(path: Path) -> dict[str, Any]:
    """Read a record of files: ``files`` maps names to results of ``describe_file``; other keys are allowed.

    Raises:
        UserError: the record is missing, damaged, or names a file outside its folder.
    """
    found = read_json(path)
    try:
        if found["schema"] != 1:
            raise NewerRecord(f"{path} has schema {found['schema']}; this version reads 1")
        for name, entry in found["files"].items():
            inside(path.parent, name)
            if not isinstance(entry["bytes"], int) or len(bytes.fromhex(entry["sha256"])) != 32:
                raise ValueError(name)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is no record of checksums ({type(error).__name__}: {error})") from None
    return dict(found)


def verify_checksums(folder: Path) -> None:
    """Compare a folder's files with its ``checksums.json``.

    Additional files are allowed if no program loads them: hidden files, Markdown pages and pictures.

    Raises:
        UserError: there is no ``checksums.json``, a file is missing or differs, or there are other additional files.
    """
    if not (folder / CHECKSUMS).is_file():
        raise UserError(
            f"{folder} has no {CHECKSUMS}, so nothing says what its files should be: verify it where it was published, "
            "and load it without --verify"
        )
    files = read_record(folder / CHECKSUMS)["files"]
    compare_checksums(folder, files)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if name not in {*files, CHECKSUMS} and path.is_file() and not hidden and path.suffix not in _HARMLESS:
            raise UserError(f"{path} is not in {CHECKSUMS}: whoever put it there did not publish {folder}")


def compare_checksums(folder: Path, files: Mapping[str, Mapping[str, Any]], *, contents: bool = True) -> None:
    """Compare files with a record.

    Args:
        folder: folder that the names are relative to.
        files: ``files`` of a record from ``read_record``.
        contents: whether the files' contents are compared; otherwise only sizes are compared.

    Raises:
        UserError: a file is missing or differs.
    """
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing, which belongs to {folder}: use another copy")
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise UserError(f"{path} has {size:,} bytes instead of {wanted['bytes']:,}: use another copy")
        if contents and describe_file(path) != dict(wanted):
            raise UserError(f"{path} is damaged (its sha256 is not the recorded one): use another copy")
