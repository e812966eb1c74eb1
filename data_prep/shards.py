"""Writing samples to MDS shards; each shard appears completely or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from streaming import MDSWriter

from data_prep.join import Row
from llmprune.data.format import TOKENS

_SHARD_BYTES = 1 << 26


class ShardWriter:
    """Writes the samples of one split of one domain; the number of samples per shard is fixed.

    Attributes:
        shards: descriptions of the written shards, in the format of an MDS index.
        waiting: samples that do not fill a shard yet.
    """

    def __init__(self, folder: Path, columns: dict[str, str], compression: str | None = None) -> None:
        """Set the folder; ``columns`` are those of MDS: encoding by name."""
        self._folder, self._columns, self._compression = folder, columns, compression
        self.shards: list[dict[str, Any]] = []
        self.waiting: list[Row] = []

    def write(self, rows: Iterable[Row]) -> None:
        """Add samples; full shards are written."""
        self.waiting += rows
        if self.waiting:
            size = max(1, _SHARD_BYTES // self.waiting[0][TOKENS].nbytes)
            while len(self.waiting) >= size:
                self._shard(self.waiting[:size])
                self.waiting = self.waiting[size:]

    def _shard(self, rows: list[Row]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".shard.") as aside:
            with MDSWriter(
                out=f"{aside}/mds",
                columns=self._columns,
                compression=self._compression,
                hashes=["xxh64"],
                size_limit=None,
            ) as writer:
                for row in rows:
                    writer.write(row)
            (shard,) = json.loads(Path(aside, "mds", "index.json").read_text())["shards"]
            self.adopt(shard, Path(aside, "mds"), move=True)

    def adopt(self, shard: dict[str, Any], folder: Path, *, move: bool = False) -> None:
        """Link, copy or move a shard from ``folder``, and give it the next number."""
        self._folder.mkdir(parents=True, exist_ok=True)
        described = dict(shard)
        for kind in ("raw_data", "zip_data"):
            if shard[kind] is not None:
                before = shard[kind]["basename"]
                name = f"shard.{len(self.shards):05}{before[before.index('.mds') :]}"
                described[kind] = {**shard[kind], "basename": name}
                if (folder / before).exists():  # a compressed shard has only the compressed file
                    (os.replace if move else link_or_copy)(folder / before, self._folder / name)
        self.shards.append(described)

    def finish(self) -> None:
        """Write the last shard and the index."""
        if self.waiting:
            self._shard(self.waiting)
            self.waiting = []
        self._folder.mkdir(parents=True, exist_ok=True)
        index = {"version": 2, "shards": self.shards}
        (self._folder / "index.json").write_text(json.dumps(index, sort_keys=True))

    def forget_others(self) -> None:
        """Delete files that belong to none of the shards."""
        known = {shard[kind]["basename"] for shard in self.shards for kind in ("raw_data", "zip_data") if shard[kind]}
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if path.name not in known:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file if the file system allows it, otherwise copy it."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
