"""Decompression up to the announced size, because a small file may decompress to more than fits into memory."""

import bz2
import gzip
import io
from collections.abc import Callable
from typing import IO, Any

import brotli  # type: ignore[import-untyped]
import zstandard
from streaming.base.compression import decompress

from llmprune.utils.errors import UserError, first_line

_STREAMS: dict[str, Callable[[IO[bytes]], Any]] = {
    "zstd": lambda file: zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True),
    "gz": gzip.open,
    "bz2": bz2.open,
}


def unpack(algorithm: str | None, packed: bytes, size: int, name: object) -> bytes:
    """Decompress data whose decompressed size is ``size`` bytes.

    Args:
        algorithm: algorithm of the compression in MDS notation, such as ``zstd:3``.
        packed: compressed bytes.
        size: number of bytes after decompression.
        name: name of the file, for messages.

    Raises:
        UserError: the result has another size, or the data can't be decompressed.
    """
    try:
        found = _at_most(size + 1, str(algorithm), packed)
    except Exception as error:  # each algorithm raises its own kinds of errors
        raise UserError(f"{name} can't be decompressed ({first_line(error)}): prepare the data again") from None
    if len(found) != size:
        amount = "more than" if len(found) > size else f"{len(found):,} of"
        raise UserError(f"{name} holds {amount} the {size:,} bytes that its index says: prepare the data again")
    return found


def _at_most(most: int, algorithm: str, packed: bytes) -> bytes:
    """The first ``most`` decompressed bytes, or a few more."""
    family = algorithm.partition(":")[0]
    if family in _STREAMS:
        with _STREAMS[family](io.BytesIO(packed)) as stream:
            return bytes(stream.read(most))
    if family == "br":
        return _brotli(most, packed)
    if family == "snappy" and _snappy_size(packed) >= most:
        return bytes(most)
    return bytes(decompress(algorithm, packed))


def _brotli(most: int, packed: bytes) -> bytes:
    decompressor, found = brotli.Decompressor(), bytearray()
    piece = decompressor.process(packed, output_buffer_limit=most)
    while piece and len(found) < most:
        found += piece
        piece = decompressor.process(b"", output_buffer_limit=most)
    return bytes(found)


def _snappy_size(packed: bytes) -> int:
    """The decompressed size of a Snappy block, from its first bytes: seven bits per byte, the lowest first."""
    size = 0
    for place, byte in enumerate(packed[:5]):
        size |= (byte & 127) << (7 * place)
        if byte < 128:
            break
    return size
