"""Reading of samples from the shards of prepared data."""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from streaming.base.compression import is_compression
from streaming.base.format import Reader
from streaming.base.format.mds import MDSReader
from streaming.base.stream import Stream
from streaming.base.world import World

from llmprune.data.cache import ShardCache, ShardFile, check_file
from llmprune.data.format import COLUMNS, LEARNED, STARTS, TEACHER_LOGS, TEACHER_TOKENS, TOKENS
from llmprune.utils.errors import UserError

NO_LOSS = -100  # label that PyTorch's losses ignore
# Errors caused by an index that does not fit its shards.
_ODD = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, AssertionError)
_LARGEST = 2**32  # largest size of a shard in bytes: MDS counts bytes in 32 bits
_ATTEMPTS = 3  # attempts to read a file that other processes may delete from the cache

Sample = dict[str, torch.Tensor]


def _of_numbers(shard: Reader) -> MDSReader:
    """A shard, if it contains only columns of prepared data; other encodings would run decoders, or code.

    Raises:
        ValueError: the shard contains something else.
    """
    if not isinstance(shard, MDSReader):
        raise ValueError("a shard is not of the format mds")
    for name, encoding in zip(shard.column_names, shard.column_encodings, strict=True):
        if name not in COLUMNS or encoding.partition(":")[0] != "ndarray":
            raise ValueError(
                f"the column '{name}' of the encoding '{encoding}' is none of prepared data, it is not read"
            )
    if not (shard.compression is None or is_compression(shard.compression)):
        raise ValueError(f"there is no compression '{shard.compression}'")
    return shard


class SplitReader:
    """Reads the samples of one split of one domain, in any process, without shared state."""

    def __init__(
        self, root: Path, domain: str, split: str, *, cache: ShardCache | None = None, boundaries: bool = False
    ) -> None:
        """Open the split's index.

        Args:
            root: folder of the data on this machine; with ``cache``, the cache's folder.
            domain: name of the domain.
            split: name of the split: ``train`` or ``eval``.
            cache: cache that shards are fetched with; None = the shards are in ``root``.
            boundaries: whether samples contain the positions within documents (see ``read``).

        Raises:
            UserError: the split is missing or damaged, or can't be reached.
        """
        self._root, self._below, self._cache, self._boundaries = root, f"{domain}/{split}", cache, boundaries
        index = root / domain / split / "index.json"
        if cache is not None:
            cache.fetch(f"{self._below}/index.json")
        if not index.is_file():
            raise UserError(f"{index} does not exist: the domain '{domain}' was moved or never prepared")
        stream = Stream(local=str(root / domain), split=split)
        try:
            found: list[Reader] = stream.get_shards(World.detect(), allow_unsafe_types=False)
            self._shards = [_of_numbers(shard) for shard in found]
            self._files = [self._file(shard) for shard in self._shards]
            if not self._files or not all(type(s.samples) is int and s.samples > 0 for s in self._shards):
                raise ValueError("it lists no shards with samples")
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(f"{index} is damaged ({error}): prepare the data again") from None
        for file in self._files if cache is None else []:
            path = root / file.name
            if not path.is_file() or path.stat().st_size != file.raw.bytes:
                raise UserError(f"{path} is missing, cut short or another one: prepare the data again")
        self.shard_sizes = [shard.samples for shard in self._shards]
        self.shard_bytes = [file.raw.bytes for file in self._files]
        self._checked: set[int] = set()

    def _file(self, shard: Reader) -> ShardFile:
        ((raw, packed),) = shard.file_pairs  # MDS has one file per shard
        for info in filter(None, (raw, packed)):
            name = PurePosixPath(info.basename)
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"a shard is outside, at {name}")
            if not 0 < info.bytes <= _LARGEST:
                raise ValueError(f"{name} can't have {info.bytes} bytes")
        return ShardFile(f"{self._below}/{raw.basename}", raw, packed, shard.compression)

    def read(self, shard: int, index: int) -> Sample:
        """One sample; the first time that a shard is read, its checksum is verified.

        Returns:
            ``input_ids``, int64 [length]. With boundaries also ``position_ids``, int64 [length], which restart at every
            document. With boundaries, and for data whose prompts are not learned, ``labels``, int64 [length]: the
            tokens, except for those without loss (prompts, padding, the first of each document), which are ``NO_LOSS``.
            With a teacher's predictions stored with the tokens also ``teacher_tokens``, int64 [length, k], and
            ``teacher_logs``, float32 [length, k].

        Raises:
            UserError: the shard is damaged or missing, or can no longer be fetched.
        """
        columns = self.row(shard, index)
        try:
            return self._sample(columns)
        except _ODD as error:
            raise self._unlike_index(error) from None

    def _unlike_index(self, error: Exception) -> UserError:
        reason = f"{type(error).__name__}: {error}"
        return UserError(
            f"{self._root / self._below}/index.json does not describe its shards ({reason}): prepare the data again"
        )

    def _sample(self, columns: dict[str, NDArray[np.generic]]) -> Sample:
        tokens = columns[TOKENS].astype(np.int64)
        sample = {"input_ids": torch.from_numpy(tokens)}
        if self._boundaries or LEARNED in columns:
            labels = tokens.copy()
            if LEARNED in columns:
                labels[columns[LEARNED] == 0] = NO_LOSS
            if self._boundaries:
                starts = columns[STARTS].astype(np.int64)
                begin = np.zeros_like(tokens)
                begin[starts] = starts
                sample["position_ids"] = torch.from_numpy(np.arange(len(tokens)) - np.maximum.accumulate(begin))
                labels[starts] = NO_LOSS
            sample["labels"] = torch.from_numpy(labels)
        if TEACHER_TOKENS in columns:
            sample[TEACHER_TOKENS] = torch.from_numpy(columns[TEACHER_TOKENS].astype(np.int64))
            sample[TEACHER_LOGS] = torch.from_numpy(columns[TEACHER_LOGS].copy())
        return sample

    def fetch_ahead(self, shards: Iterable[int]) -> None:
        """Start to fetch shards that are read next, in the background."""
        if self._cache is not None:
            files = [self._files[shard] for shard in shards]
            for file in files:
                self._cache.touch(file.name)
            self._cache.fetch_ahead(files)

    def row(self, shard: int, index: int) -> dict[str, NDArray[np.generic]]:
        """The stored columns of a sample."""
        file = self._files[shard]
        path = self._root / file.name
        try:
            for _ in range(_ATTEMPTS):
                if self._cache is not None:
                    self._cache.fetch_shard(file)
                try:
                    if shard not in self._checked:
                        check_file(path, file.raw, path)
                        self._checked.add(shard)
                    return self._shards[shard].get_item(index)  # type: ignore[no-any-return]
                except _ODD as error:
                    raise self._unlike_index(error) from None
                except (FileNotFoundError, UserError):  # deleted for another file, or damaged on this machine
                    if self._cache is None:
                        raise
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{error.filename or path} can't be read any more ({error.strerror}): put the data back where the run "
                "began with it"
            ) from None
        raise UserError(f"{path} does not stay in the cache until it is read: raise data.cache.limit")
