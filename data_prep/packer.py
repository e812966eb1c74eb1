"""Dividing documents into the splits of their domains, and writing them as samples in shards."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.join import Encoded, FittedConversations, Join, JoinedText
from data_prep.shards import ShardWriter
from data_prep.split import exceptions_for, split_of
from llmprune.data.format import EVAL, LEARNED, STARTS, TOKENS, TRAIN, SplitCounts, columns
from llmprune.data.sources import folded
from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json, write_json

_HELD_TOKENS = 1 << 24  # tokens held of a domain whose split is not settled; 64 MiB
_TAKEN_NAMES = {"manifest.json", "tokenizer"}  # names of files and folders beside the domains' folders


@dataclass(frozen=True)
class Layout:
    """The format of samples and the division into splits.

    Attributes:
        length: number of tokens of a sample.
        dtype: dtype of the token ids in shards.
        eval_fraction: share of the documents, by rank, that is for evaluation.
        settle: whether a domain that is too small for the fraction may be divided in another way.
        compression: compression of shards, such as ``zstd:3``; None = no compression.
        padding: id of the token that fills samples of conversations; None = samples are of joined text.
    """

    length: int
    dtype: str
    eval_fraction: float
    settle: bool
    compression: str | None = None
    padding: int | None = None


@dataclass(frozen=True)
class Arrival:
    """A document to be packed.

    Attributes:
        domain: name of the document's domain.
        rank: rank of the document's text; see ``data_prep.split``.
        content: tokens of the document.
        evaluation: whether the document is for evaluation, whatever its rank.
    """

    domain: str
    rank: int
    content: Encoded
    evaluation: bool = False


@dataclass
class _Domain:
    """The documents of a domain that wait until their split is known."""

    held: list[tuple[int, Encoded]] = field(default_factory=list)  # (rank, content) of the waiting documents
    tokens: Counter[str] = field(default_factory=Counter)  # tokens of the waiting documents, by the split of the hash
    settled: bool = False


class Packer:
    """Joins documents into samples and writes them, one stream per domain and split.

    The first documents of a domain are held until both of its splits have enough tokens for a sample, so that a domain
    too small for that can still be divided in another way (see ``exceptions_for``). Holding does not change the order.
    """

    def __init__(self, folder: Path, layout: Layout, notes: Path) -> None:
        """Set the folder of the output, and the folder of the notes that are needed to resume."""
        self._folder, self._layout, self._notes = folder, layout, notes
        self._domains: dict[str, _Domain] = {}
        self._exceptions: dict[int, str] = {}
        self._streams: dict[tuple[str, str], tuple[Join, ShardWriter]] = {}
        self._counts: dict[tuple[str, str], SplitCounts] = {}

    def add(self, arrivals: list[Arrival]) -> None:
        """Add documents.

        Raises:
            UserError: a domain has the name of another part of the output.
        """
        arrived: dict[str, list[Arrival]] = {}
        for arrival in arrivals:
            arrived.setdefault(arrival.domain, []).append(arrival)
        for name, documents in arrived.items():
            domain = self._domain(name)
            given = [document.content for document in documents if document.evaluation]
            ranked = [(document.rank, document.content) for document in documents if not document.evaluation]
            if given:
                self._pack(name, EVAL, given)
            if self._layout.settle:
                self._log(name, [rank for rank, _ in ranked])
            if domain.settled:
                self._divide(name, ranked)
            else:
                self._hold(name, ranked)

    def drop(self, domain: str) -> None:
        """Count a training document that is left out because its text is kept for evaluation."""
        self._domain(domain)
        self._counted(domain, TRAIN).duplicates += 1

    def pass_over(self, domain: str, split: str, documents: int) -> None:
        """Count documents that are left out because they have no text."""
        self._domain(domain)
        self._counted(domain, split).empty += documents

    def _domain(self, name: str) -> _Domain:
        if folded(name) in _TAKEN_NAMES:
            raise UserError(f"a domain can't be named '{name}', the output has another use for it: pass --domain")
        return self._domains.setdefault(
            name, _Domain(settled=self._layout.eval_fraction == 0 or not self._layout.settle)
        )

    def _hold(self, name: str, documents: list[tuple[int, Encoded]]) -> None:
        domain = self._domains[name]
        domain.held += documents
        for rank, content in documents:
            domain.tokens[split_of(rank, self._layout.eval_fraction, {})] += len(content.ids)
        both_have_samples = min(domain.tokens[TRAIN], domain.tokens[EVAL]) >= self._layout.length
        if both_have_samples or domain.tokens.total() >= _HELD_TOKENS:
            self._settle(name)

    def _settle(self, name: str) -> None:
        domain = self._domains[name]
        domain.settled = True
        held, domain.held = domain.held, []
        ranks, sizes = [rank for rank, _ in held], [len(content.ids) for _, content in held]
        fixed: set[int] = set()
        while True:
            found = exceptions_for(ranks, sizes, self._layout.eval_fraction, self._layout.length, fixed)
            elsewhere = self._logged_elsewhere(name, found.keys() - fixed)
            if not elsewhere:
                break
            fixed |= elsewhere  # the same text was already packed in another domain
        self._exceptions |= found
        self._divide(name, held)

    def _divide(self, name: str, documents: list[tuple[int, Encoded]]) -> None:
        splits: dict[str, list[Encoded]] = {}
        for rank, content in documents:
            split = split_of(rank, self._layout.eval_fraction, self._exceptions)
            splits.setdefault(split, []).append(content)
        for split, contents in splits.items():
            self._pack(name, split, contents)

    def _pack(self, name: str, split: str, contents: list[Encoded]) -> None:
        join, writer = self._stream(name, split)
        self._counted(name, split).documents += len(contents)
        self._write(name, split, join.add(contents), writer)

    def _write(self, name: str, split: str, rows: list[Any], writer: ShardWriter) -> None:
        counts = self._counted(name, split)
        counts.samples += len(rows)
        counts.tokens += len(rows) * self._layout.length
        writer.write(rows)

    def _stream(self, name: str, split: str) -> tuple[Join, ShardWriter]:
        if (name, split) not in self._streams:
            layout = self._layout
            described = columns(layout.length, layout.dtype, conversations=layout.padding is not None)
            join: Join = JoinedText(layout.length, layout.dtype)
            if layout.padding is not None:
                join = FittedConversations(layout.length, layout.dtype, layout.padding)
            writer = ShardWriter(self._folder / name / split, described, layout.compression)
            self._streams[name, split] = join, writer
        return self._streams[name, split]

    def _counted(self, name: str, split: str) -> SplitCounts:
        return self._counts.setdefault((name, split), SplitCounts())

    def _log(self, name: str, ranks: list[int]) -> None:
        """Append ranks of a domain to its file of notes."""
        self._notes.mkdir(parents=True, exist_ok=True)
        with (self._notes / f"{name}.ranks").open("ab") as file:
            np.array(ranks, np.uint64).tofile(file)

    def _logged_elsewhere(self, name: str, ranks: set[int]) -> set[int]:
        """The ranks among ``ranks`` that documents of other domains have."""
        wanted, found = np.array(sorted(ranks), np.uint64), set[int]()
        for path in self._notes.glob("*.ranks") if ranks else ():
            if path.name != f"{name}.ranks":
                there = np.memmap(path, np.uint64, "r") if path.stat().st_size else np.empty(0, np.uint64)
                for begin in range(0, len(there), 1 << 22):
                    found |= {int(rank) for rank in np.intersect1d(wanted, there[begin : begin + (1 << 22)])}
        return found

    def progress(self) -> list[tuple[str, int, int]]:
        """The number of documents and samples of every domain so far, without held documents."""
        found: dict[str, list[int]] = {}
        for (name, _), counts in self._counts.items():
            total = found.setdefault(name, [0, 0])
            total[0] += counts.documents
            total[1] += counts.samples
        return [(name, documents, samples) for name, (documents, samples) in sorted(found.items())]

    def finish(self) -> dict[str, dict[str, SplitCounts]]:
        """Write the remaining samples; returns the counts of each domain and split.

        Raises:
            UserError: there is no text, or not one training sample.
        """
        for name, domain in self._domains.items():
            if not domain.settled:
                self._settle(name)
        if not any(counts.documents or counts.duplicates for counts in self._counts.values()):
            raise UserError("the inputs hold no text: give files with text, or name its field with --text-field")
        for (name, split), (join, writer) in self._streams.items():
            self._write(name, split, join.close(), writer)
            if self._counts[name, split].samples:
                writer.finish()
        found: dict[str, dict[str, SplitCounts]] = {}
        for name in sorted(self._domains):
            train, evaluation = (self._counted(name, split) for split in (TRAIN, EVAL))
            splits = {TRAIN: train, EVAL: evaluation}
            found[name] = {split: counts for split, counts in splits.items() if counts != SplitCounts()}
        if not any(TRAIN in splits and splits[TRAIN].samples for splits in found.values()):
            raise UserError(
                f"there is too little text for one training sample of {self._layout.length} tokens: give more, or "
                "choose a smaller --sequence-length"
            )
        return found

    def checksums(self) -> list[str]:
        """The checksums of all shards, in the order of domains and splits."""
        return [
            checksum
            for key in sorted(self._streams)
            for shard in self._streams[key][1].shards
            for checksum in shard["raw_data"]["hashes"].values()
        ]

    def save(self, path: Path) -> None:
        """Save all documents and samples that are in no shard yet in the folder ``path``."""
        arrays: dict[str, Any] = {}
        streams, domains = [], []
        for place, ((name, split), (join, writer)) in enumerate(self._streams.items()):
            streams.append({"domain": name, "split": split, "shards": writer.shards})
            arrays |= {f"join/{place}/{key}": value for key, value in join.state().items()}
            arrays |= {f"waiting/{place}/{key}": value for key, value in _stack(writer.waiting).items()}
        for place, (name, domain) in enumerate(self._domains.items()):
            log = self._notes / f"{name}.ranks"
            logged = log.stat().st_size if log.exists() else 0
            domains.append({"name": name, "settled": domain.settled, "ranks": logged})
            arrays |= {f"domain/{place}/{key}": value for key, value in _held_arrays(domain.held).items()}
        path.mkdir(parents=True)
        np.savez(path / "waiting.npz", **arrays)
        counts = [[*key, asdict(value)] for key, value in self._counts.items()]
        exceptions = [[rank, split] for rank, split in self._exceptions.items()]
        write_json(
            path / "packer.json", {"streams": streams, "domains": domains, "counts": counts, "exceptions": exceptions}
        )

    def resume(self, path: Path) -> None:
        """Restore the state that was saved in ``path``, for the same folders; files written after that are deleted."""
        state, arrays = _load(path)
        for name, split, counts in state["counts"]:
            self._counts[name, split] = SplitCounts(**counts)
        self._exceptions = dict(state["exceptions"])
        for place, described in enumerate(state["domains"]):
            domain, log = self._domain(described["name"]), self._notes / f"{described['name']}.ranks"
            if log.exists():
                os.truncate(log, described["ranks"])
            domain.settled = described["settled"]
            held = list(_held(_below(arrays, f"domain/{place}/")))
            if held:
                self._hold(described["name"], held)
        for place, described in enumerate(state["streams"]):
            join, writer = self._stream(described["domain"], described["split"])
            writer.shards = described["shards"]
            writer.forget_others()
            writer.write(_unstack(_below(arrays, f"waiting/{place}/")))
            join.absorb(_below(arrays, f"join/{place}/"))
        for folder in self._folder.glob("*/*/"):
            if (folder.parent.name, folder.name) not in self._streams:
                shutil.rmtree(folder)
        for log in self._notes.glob("*.ranks"):
            if log.stem not in self._domains:
                log.unlink()

    def absorb(self, path: Path, folder: Path) -> None:
        """Add the shards in ``folder`` and the state in ``path`` of another packer, which settles nothing."""
        state, arrays = _load(path)
        for name, split, counts in state["counts"]:
            total = self._counted(name, split)
            for key, value in counts.items():
                setattr(total, key, getattr(total, key) + value)
        for described in state["domains"]:
            self._domain(described["name"])
        for place, described in enumerate(state["streams"]):
            name, split = described["domain"], described["split"]
            join, writer = self._stream(name, split)
            for shard in described["shards"]:
                writer.adopt(shard, folder / name / split)
            writer.write(_unstack(_below(arrays, f"waiting/{place}/")))
            self._write(name, split, join.absorb(_below(arrays, f"join/{place}/")), writer)


def _load(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with np.load(path / "waiting.npz") as arrays:
        return read_json(path / "packer.json"), dict(arrays)


def _below(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): arrays[name] for name in arrays if name.startswith(prefix)}


def _stack(rows: list[Any]) -> dict[str, Any]:
    """Samples as a few arrays."""
    if not rows:
        return {}
    fixed = [name for name in (TOKENS, LEARNED) if name in rows[0]]
    found = {name: np.stack([row[name] for row in rows]) for name in fixed}
    found[STARTS] = np.concatenate([row[STARTS] for row in rows])
    return {**found, "sizes": np.array([len(row[STARTS]) for row in rows])}


def _unstack(arrays: dict[str, Any]) -> list[Any]:
    if not arrays:
        return []
    starts = np.split(arrays[STARTS], np.cumsum(arrays["sizes"])[:-1])
    fixed = [name for name in (TOKENS, LEARNED) if name in arrays]
    return [{**{name: arrays[name][i] for name in fixed}, STARTS: part} for i, part in enumerate(starts)]


def _held_arrays(documents: list[tuple[int, Encoded]]) -> dict[str, Any]:
    """Documents with their ranks, as a few arrays."""
    return {
        "ranks": np.array([rank for rank, _ in documents], np.uint64),
        "sizes": np.array([len(content.ids) for _, content in documents], np.int64),
        "ids": np.concatenate([np.empty(0, np.uint32), *(content.ids for _, content in documents)]),
        "learned": np.concatenate([np.empty(0, bool), *(content.learned for _, content in documents)]),
    }


def _held(arrays: dict[str, Any]) -> Iterator[tuple[int, Encoded]]:
    cuts = np.cumsum(arrays["sizes"])[:-1]
    parts = zip(np.split(arrays["ids"], cuts), np.split(arrays["learned"], cuts), strict=True)
    for rank, (ids, learned) in zip(arrays["ranks"].tolist(), parts, strict=False):
        yield int(rank), Encoded(ids, learned)
