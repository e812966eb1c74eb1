"""Reading tensors from Composer's checkpoints, single-file or sharded, one at a time, without unsafe unpickling."""

import datetime
import math
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import EnumMeta
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.torch_version import TorchVersion

from llmprune.checkpoints.checkpoint_folder import METADATA
from llmprune.utils.errors import UserError, first_line
from llmprune.utils.files import inside

# Exceptions that reading a damaged or malicious file can raise.
_UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, LookupError, EOFError, OSError, AttributeError, TypeError, ValueError,
    ArithmeticError, MemoryError,
)  # fmt: skip
_SMALL = 2**20  # tensors up to this size in bytes are read at once

# Classes in a single-file checkpoint of Composer other than tensors and plain types: durations, the torch version,
# numpy's random state.
_SAFE_IN_WHOLE = [
    datetime.timedelta,
    TorchVersion,
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
]

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # environment variable of PyTorch

# Classes in the description of the tensors of a sharded checkpoint.
_SAFE_IN_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool"},
    "pathlib": {"PosixPath"},
}


class StoredState(Protocol):
    """The tensors of a checkpoint."""

    def tensors(self, *path: str) -> Mapping[str, Tensor]:
        """The tensors below ``path`` of Composer's state; each is read when it is used."""
        ...


def open_state(path: Path) -> StoredState:
    """Open a checkpoint: a file, or the folder of a sharded checkpoint.

    Raises:
        UserError: it is damaged, or contains objects that must not be unpickled.
    """
    try:
        return _Sharded(path) if path.is_dir() else _Whole(path)
    except _UNREADABLE as error:
        raise UserError(f"{path} is no readable checkpoint ({first_line(error)}): use another one") from None


@contextmanager
def safe_unpickling(path: Path) -> Iterator[None]:
    """Make Composer load the checkpoint at ``path`` within the ``with`` block without unpickling unsafe objects.

    Raises:
        UserError: the checkpoint contains other objects than tensors, plain types, and Composer's usual ones.
    """
    if path.is_dir():
        # Its description was checked: it refers only to known classes and to parts of its own files, so it is safe to
        # read it again.
        open_state(path)
    forced = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_SAFE_IN_WHOLE):
            yield
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} can't be loaded to resume ({first_line(error)}): use another checkpoint") from None
    except CheckpointException as error:
        raise UserError(f"{path} can't be loaded to resume ({_failure(error)}): use another checkpoint") from None
    finally:
        if forced is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = forced


class _Whole:
    """A checkpoint in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.below(())  # checks that the file can be read

    def below(self, path: tuple[str, ...]) -> Any:
        """The object at ``path`` of the state; tensors are memory-mapped, not read."""
        with torch.serialization.safe_globals(_SAFE_IN_WHOLE):
            found = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)["state"]
        for key in path:
            found = found[key]
        return found

    def tensors(self, *path: str) -> Mapping[str, Tensor]:
        return _WholeTensors(self, path)


class _WholeTensors(Mapping[str, Tensor]):
    """Maps the file again for every large tensor, because the pages of a mapping remain in memory after reading."""

    def __init__(self, whole: _Whole, path: tuple[str, ...]) -> None:
        self._whole, self._path = whole, path
        found: Mapping[str, Tensor] = whole.below(path)
        self._names = list(found)
        self._small = {name: tensor.clone() for name, tensor in found.items() if tensor.nbytes <= _SMALL}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name in self._small:
            return self._small[name]
        try:
            tensor: Tensor = self._whole.below((*self._path, name))
        except _UNREADABLE as error:
            raise UserError(
                f"{self._whole.path} could be read and now can't ({first_line(error)}): is it being deleted?"
            ) from None
        return tensor.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Sharded(FileSystemReader):
    """A checkpoint in a folder in which every rank has written its parts."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with (path / METADATA).open("rb") as file:
            self._metadata: Metadata = _MetadataUnpickler(file).load()
        self._metadata.storage_meta = StorageMeta()
        _check_parts(path, self._metadata)

    def read_metadata(self) -> Metadata:
        return self._metadata

    def tensors(self, *path: str) -> Mapping[str, Tensor]:
        return _ShardedTensors(self, ".".join(("state", *path)) + ".", self._metadata)


class _ShardedTensors(Mapping[str, Tensor]):
    def __init__(self, reader: _Sharded, prefix: str, metadata: Metadata) -> None:
        self._reader, self._prefix = reader, prefix
        self._found = {
            name.removeprefix(prefix): entry
            for name, entry in metadata.state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def __getitem__(self, name: str) -> Tensor:
        entry = self._found[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the warning that there are no other ranks
                load({self._prefix + name: tensor}, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:
            raise UserError(
                f"{self._reader.path} is damaged or incomplete ({_failure(error)}): use another one"
            ) from None
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _failure(error: CheckpointException) -> str:
    """The error message of the first rank that failed."""
    return first_line(Exception(str(next(iter(error.failures.values()))[0])))


def _check_parts(folder: Path, metadata: Metadata) -> None:
    """Check that the description of a sharded checkpoint fits its files.

    Raises:
        UserError: a part is outside the folder or beyond the end of its file, or a tensor is larger than its parts.
    """
    sizes: dict[str, int] = {}
    for part in metadata.storage_data.values():
        name = part.relative_path
        if name not in sizes:
            place = inside(folder, name)
            sizes[name] = place.stat().st_size if place.is_file() else -1
        if not _whole(part.offset, part.length) or part.offset + part.length > sizes[name]:
            raise UserError(f"{folder} is damaged or incomplete ({name} is cut short or missing): use another one")
        if getattr(part, "transform_descriptors", None):
            raise UserError(f"{folder} is packed in a way that is not read: use another one")
    available = sum(sizes.values())
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        bytes_each = entry.properties.dtype.itemsize
        fits = _whole(*entry.size) and math.prod(entry.size) * bytes_each <= available
        for chunk in entry.chunks:
            part = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
            fits = fits and len(chunk.offsets) == len(chunk.sizes) == len(entry.size)
            fits = fits and _whole(*chunk.offsets, *chunk.sizes) and math.prod(chunk.sizes) * bytes_each <= part.length
        if not fits:
            raise UserError(f"{folder} is damaged ('{name!s:.80}' is larger than its file): use another one")


def _whole(*numbers: Any) -> bool:
    return all(isinstance(number, int) and number >= 0 for number in numbers)


def _member(of: Any, name: str) -> Any:
    if not isinstance(of, EnumMeta):
        raise pickle.UnpicklingError(f"it refers to an attribute of {of}")
    return of[name]


class _MetadataUnpickler(pickle.Unpickler):
    """An unpickler that accepts only the few classes that describe tensors."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 pickles members of enums
            return _member
        if name not in _SAFE_IN_METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)
