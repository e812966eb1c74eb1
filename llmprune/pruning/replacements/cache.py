"""A cache on disk of the hidden states at both ends of a span, for several epochs without the source's blocks."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from llmprune.data.order import keyed_generator
from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json, write_json

log = logging.getLogger(__name__)

BYTES = 2  # bfloat16
_MARK = "states.json"
_TOKENS = ("labels", "positions")
_NONE = -1  # mark of a sample without positions
_ENDS = ("before", "after")


class StatesCache:
    """Memory-mapped states of samples in a folder: before and after, bfloat16, and labels and positions, int32.

    Attributes:
        samples: number of samples.
        size: size of the files in bytes.
    """

    def __init__(self, folder: Path, samples: int, length: int, hidden: int, identity: Mapping[str, Any]) -> None:
        """Describe the cache; nothing is written.

        Args:
            folder: folder of the files.
            samples: number of samples.
            length: number of tokens in each sample.
            hidden: number of hidden dimensions of a state.
            identity: plain values that the states depend on, by name.
        """
        self._folder, self.samples = folder, samples
        self._shape = (samples, length, hidden)
        self._identity = {**identity, "shape": list(self._shape)}
        self.size = samples * length * (2 * hidden * BYTES + 8)

    @property
    def is_complete(self) -> bool:
        """Whether all states are written."""
        mark = self._folder / _MARK
        return mark.is_file() and bool(read_json(mark)["complete"])

    def check_room(self) -> None:
        """Check that the states are written, or can be written.

        Raises:
            UserError: the folder contains something else, or the disk has too little space for the states.
        """
        mark = self._folder / _MARK
        if mark.is_file() and read_json(mark)["of"] != self._identity:
            raise UserError(
                f"{self._folder} holds states of another model, span or data: name another "
                "block_replacement.cache.folder, or delete it"
            )
        if self._folder.exists() and not self._folder.is_dir():
            raise UserError(f"block_replacement.cache.folder {self._folder} is a file: name a folder")
        if not mark.is_file() and self._folder.exists() and any(self._folder.iterdir()):
            raise UserError(f"{self._folder} holds something else: name another block_replacement.cache.folder")
        if self.is_complete:
            return
        place = next(path for path in (self._folder, *self._folder.resolve().parents) if path.exists())
        free = shutil.disk_usage(place).free + sum(p.stat().st_size for p in self._folder.glob("*") if p.is_file())
        if self.size > free:
            raise UserError(
                f"the states of {self.samples:,} samples take {self.size / 1e9:.1f} GB, but in {place} there are "
                f"{free / 1e9:.1f} GB: choose fewer block_replacement.cache.samples, or another folder"
            )

    def create(self) -> None:
        """Create the files, empty; one process of each machine does this."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._note(complete=False)
        for name in (*_ENDS, *_TOKENS):
            self._map(name, "w+")

    def complete(self) -> None:
        """Mark the states as complete."""
        self._note(complete=True)
        log.info(
            "the states of %s samples are written: %.2f GB in %s", f"{self.samples:,}", self.size / 1e9, self._folder
        )

    def _note(self, *, complete: bool) -> None:
        write_json(self._folder / _MARK, {"complete": complete, "of": self._identity})

    def write(self, places: list[int], before: Tensor, after: Tensor, labels: Tensor, positions: Tensor | None) -> None:
        """Store the states [n, length, hidden], labels and positions [n, length] of the samples at some places.

        Without positions, attention covers the whole sample.
        """
        for name, states in (("before", before), ("after", after)):
            self._map(name, "r+")[places] = states.to(torch.bfloat16).cpu().view(torch.int16).numpy()
        self._map("labels", "r+")[places] = labels.cpu().numpy()
        self._map("positions", "r+")[places] = _NONE if positions is None else positions.cpu().numpy()

    def _map(self, name: str, mode: Any) -> Any:
        shape, dtype = (self._shape[:2], np.int32) if name in _TOKENS else (self._shape, np.int16)
        return np.memmap(self._folder / name, dtype, mode, shape=shape)

    def read(self, place: int) -> dict[str, Tensor]:
        """One sample: ``before`` and ``after`` [length, hidden], and labels, which also serve as its input ids."""
        found = {name: torch.from_numpy(self._map(name, "r")[place].copy()).view(torch.bfloat16) for name in _ENDS}
        labels, positions = (torch.from_numpy(self._map(name, "r")[place].astype(np.int64)) for name in _TOKENS)
        found |= {"input_ids": labels.clamp(min=0), "labels": labels}
        return found if positions[0] == _NONE else {**found, "position_ids": positions}


class CachedStates(IterableDataset[dict[str, Tensor]]):
    """The endless training stream from a cache, in a new order in every epoch.

    Slot n is the same sample for any number of ranks and workers, as in ``llmprune.data.dataset.MixedDataset``.
    """

    def __init__(self, cache: StatesCache, *, global_batch_size: int, seed: int, rank: int, world_size: int) -> None:
        """Read from ``cache``; it may be empty until the first sample is requested."""
        self._cache, self._batch, self._seed = cache, global_batch_size, seed
        self._rank, self._world_size = rank, world_size
        self._start = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's and this worker's samples endlessly."""
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        per_rank = self._batch // self._world_size
        batch = number
        while True:
            first = self._start + batch * self._batch + self._rank * per_rank
            for slot in range(first, first + per_rank):
                yield self._cache.read(self._place(slot))
            batch += workers

    def _place(self, slot: int) -> int:
        epoch, within = divmod(slot, self._cache.samples)
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._order = epoch, keyed_generator(self._seed, epoch).permutation(self._cache.samples)
        return int(self._order[within])

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """The position of the stream after ``num_samples`` samples over all ranks."""
        return {"slot": num_samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved position, on any number of ranks and workers."""
        self._start = int(state["slot"])
