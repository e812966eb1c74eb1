"""Documents into the splits of their domains, and there into samples and shards."""

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

_HELD_TOKENS = 1 << 24  # of a domain whose split is not settled; 64 MiB
_TAKEN_NAMES = {"manifest.json", "tokenizer"}  # of files and folders that stand beside the domains


@dataclass(frozen=True)
class Layout:
    """What samples are made like.

    Attributes:
        length: tokens of a sample.
        dtype: of the ids in shards.
        eval_fraction: share of the documents, by rank, that is for evaluation.
        settle: whether domains too small for the fraction may be split another way.
        compression: of shards.
        padding: the token that fills up samples of conversations; None = samples are of joined text.
    """

    length: int
    dtype: str
    eval_fraction: float
    settle: bool
    compression: str | None = None
    padding: int | None = None


@dataclass(frozen=True)
class Arrival:
    """A document that is to be packed.

    Attributes:
        domain: its domain.
        rank: of its text; see ``data_prep.split``.
        content: its tokens.
        evaluation: whether it is for evaluation, whatever its rank.
    """

    domain: str
    rank: int
    content: Encoded
    evaluation: bool = False


@dataclass
class _Domain:
    """The documents of a domain that wait until it is known which split they belong to."""

    held: list[tuple[int, Encoded]] = field(default_factory=list)  # rank, content
    tokens: Counter[str] = field(default_factory=Counter)  # of those by split, as the hash says
    settled: bool = False


class Packer:
    """Joins documents into samples and writes them, a stream per domain and split.

    The first documents of a domain are held until both of its splits have a sample's worth of tokens, so that a domain
    too small for that can still be split another way (see ``exceptions_for``). Holding changes no order.
    """

    def __init__(self, folder: Path, layout: Layout, notes: Path) -> None:
        """Write below ``folder``, and what is needed to go on into ``notes``."""
        self._folder, self._layout, self._notes = folder, layout, notes
        self._domains: dict[str, _Domain] = {}
        self._exceptions: dict[int, str] = {}
        self._streams: dict[tuple[str, str], tuple[Join, ShardWriter]] = {}
        self._counts: dict[tuple[str, str], SplitCounts] = {}

    def add(self, arrivals: list[Arrival]) -> None:
        """Take documents.

        Raises:
            UserError: a domain has the name of something else in the output.
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
        """Count a document of training that is left out because its text is kept for evaluation."""
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
            fixed |= elsewhere  # the same text was packed in another domain
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
        """Note the ranks of a domain, on disk."""
        self._notes.mkdir(parents=True, exist_ok=True)
        with (self._notes / f"{name}.ranks").open("ab") as file:
            np.array(ranks, np.uint64).tofile(file)

    def _logged_elsewhere(self, name: str, ranks: set[int]) -> set[int]:
        """Those of ``ranks`` that documents of other domains have."""
        wanted, found = np.array(sorted(ranks), np.uint64), set[int]()
        for path in self._notes.glob("*.ranks") if ranks else ():
            if path.name != f"{name}.ranks":
                there = np.memmap(path, np.uint64, "r") if path.stat().st_size else np.empty(0, np.uint64)
                for begin in range(0, len(there), 1 << 22):
                    found |= {int(rank) for rank in np.intersect1d(wanted, there[begin : begin + (1 << 22)])}
        return found

    def progress(self) -> list[tuple[str, int, int]]:
        """Every domain with the documents and samples that it has so far; those that are held are not among them."""
        found: dict[str, list[int]] = {}
        for (name, _), counts in self._counts.items():
            total = found.setdefault(name, [0, 0])
            total[0] += counts.documents
            total[1] += counts.samples
        return [(name, documents, samples) for name, (documents, samples) in sorted(found.items())]

    def finish(self) -> dict[str, dict[str, SplitCounts]]:
        """Write what is left; what each domain and split holds.

        Raises:
            UserError: there is no text, or not one sample to train on.
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
        """Those of all shards, in order of domains and splits."""
        return [
            checksum
            for key in sorted(self._streams)
            for shard in self._streams[key][1].shards
            for checksum in shard["raw_data"]["hashes"].values()
        ]

    def save(self, path: Path) -> None:
        """Write everything that has been taken and is in no shard yet into the folder ``path``."""
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
        """Become the packer that saved itself in ``path``, in the same folders; what it wrote later is deleted."""
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
        """Add what another packer, which settles nothing, wrote into ``folder`` and saved in ``path``."""
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
    """Documents as a few arrays."""
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
