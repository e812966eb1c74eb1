"""Reading documents: plain text and JSON lines, plain, .gz or .zst.

Formats that are no streams of bytes (Parquet, data sets of the hub) would be further kinds of ``documents``.
"""

import gzip
import io
import json
import re
import unicodedata
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from llmprune.errors import UserError


@dataclass(frozen=True)
class Document:
    """A text, its domain, and how many bytes of all inputs had been read when it was found."""

    text: str
    domain: str
    position: int


@dataclass(frozen=True)
class BadRecord:
    """A record that could not be read: where it is and what is wrong."""

    place: str
    reason: str


@dataclass(frozen=True)
class Fields:
    """Which fields of a JSON record matter (nested ones with dots) and what overrides the domain.

    Attributes:
        text: holds the text.
        domain_field: holds the domain.
        domain: one domain for everything.
    """

    text: str = "text"
    domain_field: str | None = None
    domain: str | None = None


def read_text(stream: BinaryIO, limit: int | None = None) -> Iterator[tuple[int, bytes]]:
    """A text file is one document; ``limit`` bytes of it, if given, up to the last whole character."""
    read = stream.read(-1 if limit is None else limit)
    yield 1, read if limit is None else _whole_characters(read)


def _whole_characters(text: bytes) -> bytes:
    """UTF-8 without a character that was cut at the end (a character has at most four bytes)."""
    for cut in range(1, min(4, len(text)) + 1):
        if text[-cut] & 0xC0 != 0x80:  # the first byte of the last character
            size = next((n for n, bits in ((4, 0xF0), (3, 0xE0), (2, 0xC0)) if text[-cut] >= bits), 1)
            return text if cut >= size else text[:-cut]
    return text


def read_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """A file of JSON lines is one document a line; empty lines are passed over."""
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield number, line


_JSON = (".jsonl", ".ndjson")
FORMATS = (".txt", ".md", *_JSON)
_COMPRESSED = {".gz", ".zst"}


def find_files(inputs: Sequence[Path]) -> list[tuple[Path, str]]:
    """All readable files among ``inputs`` (folders are searched), each once, with its domain by folder.

    The domain is the folder directly below the input folder, or the folder that a file itself lies in. A file that is
    reached in several ways, by links too, counts where it is found first.

    Raises:
        UserError: an input does not exist, or no file is of a known format.
    """
    found: dict[Path, tuple[Path, str]] = {}
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path} does not exist")
        root = path.resolve()
        if path.is_file():
            if _format(path) not in FORMATS:
                raise UserError(f"{path} is of no known format; known: {', '.join(FORMATS)}, each also .gz or .zst")
            found.setdefault(root, (path, root.parent.name))
            continue
        for file in sorted(path.rglob("*")):
            if file.is_file() and _format(file) in FORMATS:
                inner = file.relative_to(path).parts
                found.setdefault(file.resolve(), (file, inner[0] if len(inner) > 1 else root.name))
    if not found:
        raise UserError(
            f"{', '.join(map(str, inputs))} holds no readable files; known: {', '.join(FORMATS)}, each also .gz or .zst"
        )
    return list(found.values())


def documents(
    files: Sequence[tuple[Path, str]], fields: Fields, text_bytes: int | None = None
) -> Iterator[Document | BadRecord]:
    """Every document of ``files``, and every record that could not be read.

    Args:
        files: with their domains; see ``find_files``.
        fields: of JSON records.
        text_bytes: read only so much of a text file; None = all.

    Raises:
        UserError: two domains would get the same name.
    """
    names = _Names()
    if fields.domain is None and fields.domain_field is None:
        for _, folder in files:
            names.clean(folder)  # a clash shows before anything is read
    before = 0
    for path, folder in files:
        with path.open("rb") as raw:
            is_json = _format(path) in _JSON
            number = 0
            try:
                stream = _decompressed(raw, path.suffix)
                for number, record in read_lines(stream) if is_json else read_text(stream, text_bytes):
                    place = f"{path}:{number}"
                    try:
                        text, domain = _parse_json(record, fields) if is_json else (record.decode("utf-8-sig"), None)
                    except (ValueError, KeyError, TypeError, RecursionError) as error:
                        yield BadRecord(place, _reason(error))
                        continue
                    if text.strip():
                        yield Document(text, names.clean(fields.domain or domain or folder), before + raw.tell())
            except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
                # A damaged archive: what was read before the damage is kept, the rest is lost.
                yield BadRecord(f"{path}:{number + 1}", f"the file is damaged from here on ({error})")
        before += path.stat().st_size


def clean_name(name: str) -> str:
    """A domain's name as a folder name: letters and digits of any script, ``.``, ``_`` and ``-``; no dot in front."""
    kept = (c if c in "._-" or c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in name)
    cleaned = re.sub(" +", "_", "".join(kept)).lstrip(".")
    return cleaned.encode()[:100].decode(errors="ignore") or "unnamed"


class _Names:
    """The clean names of domains, of which no two are the same."""

    def __init__(self) -> None:
        self._cleaned: dict[str, str] = {}
        self._originals: dict[str, str] = {}

    def clean(self, name: str) -> str:
        name = unicodedata.normalize("NFC", name)  # file systems spell the same name in different ways
        if name not in self._cleaned:
            cleaned = clean_name(name)
            original = self._originals.setdefault(cleaned, name)
            if original != name:
                raise UserError(
                    f"the domains '{original}' and '{name}' would both be named '{cleaned}': "
                    "rename one of them, or pass --domain"
                )
            self._cleaned[name] = cleaned
        return self._cleaned[name]


def _parse_json(record: bytes, fields: Fields) -> tuple[str, str | None]:
    value = json.loads(record.decode("utf-8-sig"))
    text = _field(value, fields.text)
    text.encode("utf-8")  # an escaped lone surrogate is JSON but no text; this raises a ValueError
    domain = None if fields.domain_field is None else _field(value, fields.domain_field)
    return text, domain


def _field(record: Any, dotted: str) -> str:
    value = record
    for name in dotted.split("."):
        if not isinstance(value, dict) or name not in value:
            raise KeyError(f"no field '{dotted}'")
        value = value[name]
    if not isinstance(value, str):
        raise TypeError(f"field '{dotted}' is no string")
    return value


def _reason(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) else str(error)


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix.lower() == ".gz":
        return cast(BinaryIO, gzip.open(raw))
    if suffix.lower() == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdReader(raw), 1 << 17))
    return raw


class _ZstdReader(io.RawIOBase):
    """Decompresses one zstd frame after the other; unlike the library's reader, it notices a truncated last one."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._in_frame = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._in_frame = zstandard.ZstdDecompressor().decompressobj(), False
            data = data or self._raw.read(1 << 17)
            if not data:
                if self._in_frame:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                return 0
            self._in_frame = True
            self._ready = memoryview(self._frame.decompress(data))
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size
