"""Samples into MDS shards, each of which is there whole or not at all."""

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
    """Writes the samples of one split of one domain, as many into each shard, whenever they are written.

    Attributes:
        shards: descriptions of those written, as an MDS index holds them.
        waiting: samples that do not fill a shard yet.
    """

    def __init__(self, folder: Path, columns: dict[str, str], compression: str | None = None) -> None:
        """Write into ``folder``; ``columns`` as of MDS."""
        self._folder, self._columns, self._compression = folder, columns, compression
        self.shards: list[dict[str, Any]] = []
        self.waiting: list[Row] = []

    def write(self, rows: Iterable[Row]) -> None:
        """Take samples."""
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
        """Take over a shard that lies in ``folder``, under the next number."""
        self._folder.mkdir(parents=True, exist_ok=True)
        described = dict(shard)
        for kind in ("raw_data", "zip_data"):
            if shard[kind] is not None:
                before = shard[kind]["basename"]
                name = f"shard.{len(self.shards):05}{before[before.index('.mds') :]}"
                described[kind] = {**shard[kind], "basename": name}
                if (folder / before).exists():  # of a compressed shard only the compressed file
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
        """Delete files that are none of the shards'."""
        known = {shard[kind]["basename"] for shard in self.shards for kind in ("raw_data", "zip_data") if shard[kind]}
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            if path.name not in known:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file where the file system allows it, else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
