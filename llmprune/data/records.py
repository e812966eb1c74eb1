"""Records of text, JSON lines (plain, .gz or .zst), Parquet and Hugging Face datasets."""

import gzip
import io
import os
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import zstandard

from llmprune.utils.errors import UserError, first_line

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from pyarrow import RecordBatch

_TEXT, _JSON, _PARQUET = (".txt", ".md"), (".jsonl", ".ndjson"), (".parquet",)
FORMATS = (*_TEXT, *_JSON, *_PARQUET)
KNOWN = f"{', '.join(FORMATS)}; text and JSON lines also .gz or .zst; hf:NAME:CONFIG:SPLIT for a Hugging Face dataset"
_COMPRESSED = {".gz", ".zst"}
_HUB = "hf:"

RECORD_BYTES = 64 << 20  # largest size of a record, and of its text
_BATCH_ROWS = 32  # rows of a Parquet file: few, since one stored value may fill many rows
_PAGE_BYTES = 1 << 20  # bytes of a Parquet file's columns that are read at a time
_SLICE = 1 << 10  # bytes of a zstd stream that are decompressed at a time, to 32 MiB at most


class DamagedInput(Exception):
    """An input is damaged and can't be read after some record."""


class TooLarge(ValueError):
    """A record, or its text, is larger than ``RECORD_BYTES``."""

    def __init__(self, remedy: str = "leave it out, or cut it") -> None:
        """Make the message, with advice to the user."""
        super().__init__(f"it is larger than {RECORD_BYTES >> 20} MiB, the limit of a record: {remedy}")


@dataclass(frozen=True)
class Input:
    """An input: a file or a Hugging Face dataset.

    Attributes:
        name: path of the file, or ``hf:NAME:CONFIG:SPLIT``.
        folder: name of the domain, unless another is given.
        size: size in bytes; 0 = unknown.
        changed: time of the last change, in nanoseconds; 0 = unknown.
        part: index and number of parts (i, n): only the i-th of n parts of the records is read; only for datasets.
    """

    name: str
    folder: str
    size: int
    changed: int = 0
    part: tuple[int, int] = (0, 1)

    @property
    def path(self) -> Path | None:
        """The path on this machine; None = the input is not on this machine."""
        name = self.name.removeprefix(_HUB).partition(":")[0] if self.is_dataset else self.name
        return Path(name) if not self.is_dataset or Path(name).exists() else None

    @property
    def is_dataset(self) -> bool:
        """Whether the input is a Hugging Face dataset."""
        return self.name.startswith(_HUB)

    @property
    def is_text(self) -> bool:
        """Whether the input is a text file, which is one record."""
        return not self.is_dataset and _format(Path(self.name)) in _TEXT


def find_inputs(inputs: Sequence[str | Path]) -> list[Input]:
    """All readable files among ``inputs`` (folders are searched), each once, and the datasets.

    The domain of a file is the folder directly below the input folder, or the folder that contains the file; that of a
    dataset is the last part of its name. A file that is found in several ways, also by links, counts where it is found
    first.

    Raises:
        UserError: an input does not exist, is neither a file nor a folder, or no file is of a known format.
    """
    found: dict[str | Path, Input] = {}
    for name in map(str, inputs):
        if name.startswith(_HUB):
            found.setdefault(name, Input(name, Path(name.removeprefix(_HUB).partition(":")[0]).name, 0))
            continue
        path = Path(name)
        if not path.exists():
            raise UserError(f"{path} does not exist")
        root = path.resolve()
        if path.is_file():
            if _format(path) not in FORMATS:
                raise UserError(f"{path} is of no known format; known: {KNOWN}")
            found.setdefault(root, _file(path, root.parent.name))
            continue
        if not path.is_dir():
            raise UserError(f"{path} is neither a file nor a folder: write what it gives into a file")
        for file in sorted(_files(path)):
            if _format(file) in FORMATS:
                if not file.is_file():
                    raise UserError(f"{file} is no file (a pipe, a device or a link to nothing): take it away")
                inner = file.relative_to(path).parts
                found.setdefault(file.resolve(), _file(file, inner[0] if len(inner) > 1 else root.name))
    if not found:
        raise UserError(f"{', '.join(map(str, inputs))} holds no readable files; known: {KNOWN}")
    return list(found.values())


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, also through links, each folder once."""
    seen = set()
    for name, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(folders)
        here = Path(name)
        if here.resolve() in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add(here.resolve())
        yield from (here / file for file in files)


def _file(path: Path, folder: str) -> Input:
    status = path.stat()
    return Input(str(path), folder, status.st_size, status.st_mtime_ns)


def records(
    source: Input, *, after: int = 0, fields: Collection[str] | None = None, text_bytes: int | None = None
) -> Iterator[tuple[int, bytes | Mapping[str, Any] | TooLarge, int]]:
    """The records of an input: (number, content, bytes of the input read so far).

    The content is text, a line of JSON, or a mapping; for a record that is too large to be read it is a ``TooLarge``,
    and no more than the limit is ever in memory. Numbers begin at 1; a text file is one record.

    Args:
        source: input to read.
        after: number of the last record that is skipped; 0 = none is skipped.
        fields: names of the top-level fields that are needed; None = all.
        text_bytes: number of bytes of a text file that are read, up to a whole character; None = all.

    Raises:
        UserError: a dataset can't be opened, or its download fails: it can be tried again later.
        DamagedInput: the rest of a file can't be read.
    """
    if source.is_dataset:
        yield from _dataset_records(source, after, fields)
        return
    path = Path(source.name)
    try:
        if _format(path) in _PARQUET:
            yield from _parquet_records(path, after, fields)
            return
        with path.open("rb") as raw:
            stream = _decompressed(raw, path.suffix)
            if not source.is_text:
                for number, line in enumerate(_lines(stream), 1):
                    if number > after and (isinstance(line, TooLarge) or line.strip()):
                        yield number, line, raw.tell()
            elif not after:
                yield 1, _text(stream, text_bytes), raw.tell()
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DamagedInput(str(error)) from None


def _lines(stream: BinaryIO) -> Iterator[bytes | TooLarge]:
    while line := stream.readline(RECORD_BYTES + 1):
        if len(line) <= RECORD_BYTES:
            yield line
            continue
        while not line.endswith(b"\n") and (line := stream.readline(1 << 17)):
            pass
        yield TooLarge()


def _text(stream: BinaryIO, first: int | None) -> bytes | TooLarge:
    """A whole text, or its ``first`` bytes up to a whole character."""
    if first is not None:
        return _whole_characters(stream.read(min(first, RECORD_BYTES)))
    text = stream.read(RECORD_BYTES + 1)
    return text if len(text) <= RECORD_BYTES else TooLarge("part it into several files, or make it JSON lines")


def _parquet_records(
    path: Path, after: int, fields: Collection[str] | None
) -> Iterator[tuple[int, Mapping[str, Any], int]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, buffer_size=_PAGE_BYTES, pre_buffer=False) as file:
            names = file.schema_arrow.names
            columns = names if fields is None else [name for name in names if name in fields]
            number = read = 0
            for group in range(file.metadata.num_row_groups):
                described = file.metadata.row_group(group)
                chunks = [described.column(place) for place in range(described.num_columns)]
                read += sum(chunk.total_compressed_size for chunk in chunks)
                if number + described.num_rows <= after:
                    number += described.num_rows
                    continue
                row = sum(chunk.total_uncompressed_size for chunk in chunks) // max(described.num_rows, 1)
                rows = min(max(RECORD_BYTES // max(row, 1), 1), _BATCH_ROWS)
                for batch in file.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
                    for place in range(batch.num_rows):
                        number += 1
                        if number > after:
                            yield number, _row(batch, place), read
    except pa.ArrowException as error:
        raise DamagedInput(first_line(error)) from None


def _row(batch: "RecordBatch", place: int) -> Mapping[str, Any]:
    """A row without values that Python can't represent, such as text that is not UTF-8."""
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        with suppress(ValueError, OverflowError):
            row[name] = column[place].as_py()
    return row


def _dataset_records(
    source: Input, after: int, fields: Collection[str] | None
) -> Iterator[tuple[int, Mapping[str, Any], int]]:
    from datasets.distributed import split_dataset_by_node

    dataset = _open_dataset(source)
    if source.part[1] > 1:
        dataset = split_dataset_by_node(dataset, *source.part)
    if fields is not None and dataset.column_names is not None:
        dataset = dataset.select_columns([name for name in dataset.column_names if name in fields])
    rows, number = iter(dataset.skip(after)), after
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # errors of the network, the hub or a reader of files
            raise UserError(f"{source.name} ends after record {number}: {first_line(error)}") from None
        if row is None:
            return
        number += 1
        yield number, row, 0


def _open_dataset(source: Input) -> "Dataset | IterableDataset":
    from datasets import DatasetDict, load_dataset, load_from_disk

    name, config, split, *rest = [*source.name.removeprefix(_HUB).split(":"), "", ""]
    if not name or len(rest) > 2 or any(rest):
        raise UserError(f"{source.name} is no dataset: write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    try:
        if any((Path(name) / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            saved = load_from_disk(name)
            return saved[split or "train"] if isinstance(saved, DatasetDict) else saved
        return load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"the dataset {source.name} can't be opened: {first_line(error)}") from None


def _whole_characters(text: bytes) -> bytes:
    """UTF-8 without an incomplete character at the end (a character has at most four bytes)."""
    for cut in range(1, min(4, len(text)) + 1):
        if text[-cut] & 0xC0 != 0x80:  # the first byte of the last character
            size = next((n for n, bits in ((4, 0xF0), (3, 0xE0), (2, 0xC0)) if text[-cut] >= bits), 1)
            return text if cut >= size else text[:-cut]
    return text


def _format(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] not in _PARQUET else ""
    return suffixes[-1] if suffixes else ""


def _decompressed(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix.lower() == ".gz":
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, gzip.open(raw)), 1 << 17))
    if suffix.lower() == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdReader(raw), 1 << 17))
    return raw


class _ZstdReader(io.RawIOBase):
    """Decompresses one zstd frame after the other; unlike the library's reader, it detects a truncated last frame."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._in_frame = False
        self._packed = memoryview(b"")
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._in_frame = zstandard.ZstdDecompressor().decompressobj(), False
            if not data:
                self._packed = self._packed or memoryview(self._raw.read(1 << 17))
                data, self._packed = bytes(self._packed[:_SLICE]), self._packed[_SLICE:]
            if not data:
                if self._in_frame:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                return 0
            self._in_frame = True
            self._ready = memoryview(self._frame.decompress(data))
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size
