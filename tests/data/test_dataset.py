"""The training stream and the evaluation samples, read from real shards."""

import json
import re
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming import JSONWriter, MDSWriter
from torch.utils.data import DataLoader

from llmprune.data.dataset import EvalDataset, MixedDataset
from llmprune.data.format import DataManifest
from llmprune.data.prepared import PreparedData
from llmprune.data.weight_changes import WeightChanges
from llmprune.utils.errors import UserError

BATCH = 8
DELAY = 6  # two workers load four batches ahead, three six
WEIGHTS = {"numbers": 0.6, "letters": 0.4}


def stream(
    data: Path,
    batches: int,
    *,
    rank: int = 0,
    ranks: int = 1,
    workers: int = 0,
    start: int = 0,
    state: dict[str, Any] | None = None,
    changes: dict[int, list[int]] | None = None,
    partitions: int = 1,
) -> list[list[int]]:
    """The samples of one rank's batches, each flattened to a list with its domain at the end."""
    dataset = MixedDataset(
        PreparedData(data),
        global_batch_size=BATCH,
        weights=WEIGHTS,
        seed=3,
        rank=rank,
        world_size=ranks,
        partitions=partitions,
    )
    if state is not None:
        dataset.load_state_dict(state)
    loader = iter(DataLoader(dataset, batch_size=BATCH // ranks, num_workers=workers))
    rows = []
    for number in range(start, start + batches):
        if number in (changes or {}):
            dataset.change_weights(changes[number], number + DELAY)
        batch = next(loader)
        rows += torch.cat([batch["input_ids"], batch["domain"][:, None]], 1).tolist()
    return rows


def test_ranks_together_see_what_one_rank_sees(data: Path) -> None:
    alone = stream(data, 6)
    halves = [stream(data, 6, rank=rank, ranks=2) for rank in (0, 1)]
    joined = [row for i in range(0, 24, 4) for half in halves for row in half[i : i + 4]]
    assert joined == alone


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_nothing(data: Path, workers: int) -> None:
    assert stream(data, 7, workers=workers) == stream(data, 7)


def test_a_resumed_stream_goes_on_where_it_stopped(data: Path) -> None:
    state = MixedDataset(PreparedData(data), global_batch_size=BATCH, weights=WEIGHTS, seed=3).state_dict(
        5 * BATCH, True
    )
    assert stream(data, 4, start=5, workers=2, state=state) == stream(data, 9)[5 * BATCH :]


CHANGES = {2: [800_000, 200_000], 3: [100_000, 900_000], 9: [500_000, 500_000]}


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (1, 3), (2, 0), (2, 2)])
def test_changed_weights_reach_every_rank_and_worker_at_the_same_sample(data: Path, ranks: int, workers: int) -> None:
    alone = stream(data, 20, changes=CHANGES)
    parts = [stream(data, 20, rank=r, ranks=ranks, workers=workers, changes=CHANGES) for r in range(ranks)]
    size = BATCH // ranks
    assert [row for i in range(0, 20 * size, size) for part in parts for row in part[i : i + size]] == alone
    counts = [sum(row[-1] == 0 for row in alone[i * BATCH : (i + 1) * BATCH]) for i in range(20)]
    due = [0.4] * 8 + [0.8] + [0.1] * 6 + [0.5] * 5
    assert all(abs(sum(counts[:n]) - BATCH * sum(due[:n])) < 1 for n in range(21))


@pytest.mark.parametrize("killed", [1, 2, 4, 8, 9, 12, 16])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_anywhere_between_changes(data: Path, killed: int, workers: int) -> None:
    """Those that were announced but not reached are in the state; it stays as long as it was."""
    whole = stream(data, 20, changes=CHANGES)
    dataset = MixedDataset(PreparedData(data), global_batch_size=BATCH, weights=WEIGHTS, seed=3)
    for number, weights in CHANGES.items():
        if number <= killed:
            dataset.change_weights(weights, number + DELAY)
    state = json.loads(json.dumps(dataset.state_dict(killed * BATCH, True)))
    assert len(json.dumps(state)) < 400
    later = {number: weights for number, weights in CHANGES.items() if number > killed}
    rest = stream(data, 20 - killed, start=killed, state=state, changes=later, workers=workers)
    assert rest == whole[killed * BATCH :]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 1), (4, 0)])
def test_lanes_on_any_number_of_ranks_and_resumed(data: Path, ranks: int, workers: int) -> None:
    whole = stream(data, 20, changes=CHANGES, partitions=4)
    assert sorted(map(tuple, whole)) != sorted(map(tuple, stream(data, 20, changes=CHANGES)))
    dataset = MixedDataset(PreparedData(data), global_batch_size=BATCH, weights=WEIGHTS, seed=3, partitions=4)
    for number in (2, 3):
        dataset.change_weights(CHANGES[number], number + DELAY)
    state = json.loads(json.dumps(dataset.state_dict(5 * BATCH, True)))
    parts = [
        stream(
            data, 15, rank=r, ranks=ranks, workers=workers, start=5, state=state, changes={9: CHANGES[9]}, partitions=4
        )
        for r in range(ranks)
    ]
    size = BATCH // ranks
    assert [row for i in range(0, 15 * size, size) for part in parts for row in part[i : i + size]] == whole[
        5 * BATCH :
    ]
    with pytest.raises(UserError, match="data.partitions is 2, but the run began with 4"):
        stream(data, 1, state=state, partitions=2)
    with pytest.raises(UserError, match="of another version"):
        stream(data, 1, state={"samples": 3})
    with pytest.raises(UserError, match="not one for each of 5000 partitions"):
        stream(data, 1, partitions=5000)


def test_lanes_of_a_domain_see_all_of_it_before_they_repeat(data: Path) -> None:
    samples = DataManifest.load(data).domains["letters"]["train"].samples
    stream = iter(MixedDataset(PreparedData(data), global_batch_size=4, weights={"letters": 1}, seed=0, partitions=4))
    seen = [tuple(next(stream)["input_ids"].tolist()) for _ in range(samples - samples % 4)]
    whole = iter(MixedDataset(PreparedData(data), global_batch_size=1, weights={"letters": 1}, seed=0))
    once = Counter(tuple(next(whole)["input_ids"].tolist()) for _ in range(samples))
    assert not Counter(seen) - once


def test_what_has_been_seen(data: Path) -> None:
    dataset = MixedDataset(PreparedData(data), global_batch_size=BATCH, weights=WEIGHTS, seed=3)
    dataset.change_weights(CHANGES[2], 4)
    assert dataset.weights == {"letters": 0.8, "numbers": 0.2}
    assert sum(dataset.samples_seen(4).values()) == 32 and abs(dataset.samples_seen(4)["letters"] - 12.8) < 1
    assert abs(dataset.samples_seen(14)["letters"] - 12.8 - 64) < 1
    samples = dataset.manifest.domains["letters"]["train"].samples
    assert dataset.epochs_seen(14)["letters"] == dataset.samples_seen(14)["letters"] / samples


def test_changes_that_come_too_late_are_refused(data: Path) -> None:
    dataset = MixedDataset(PreparedData(data), global_batch_size=BATCH, weights=WEIGHTS, seed=3)
    loader = iter(DataLoader(dataset, batch_size=BATCH, num_workers=2))
    next(loader)
    for _ in range(100):  # workers load two batches each ahead
        if int(dataset._changes._reached.max()) >= 4 * BATCH:
            break
        time.sleep(0.1)
    with pytest.raises(ValueError, match="come too late"):
        dataset.change_weights(CHANGES[2], 2)
    dataset.change_weights(CHANGES[2], 1 + 4)


def test_nothing_shared_has_a_name() -> None:
    before = set(Path("/dev/shm").iterdir())
    changes = WeightChanges(3)
    changes.add(8, [1, 2, 3])
    assert changes.since(0) == [(8, [1, 2, 3])] and changes.since(1) == []
    assert set(Path("/dev/shm").iterdir()) <= before


def test_proportions_are_those_asked_for(data: Path) -> None:
    domains = [row[-1] for row in stream(data, 10)]
    assert abs(domains.count(1) - 0.6 * 80) < 1  # domains are numbered alphabetically


def test_one_epoch_has_no_sample_twice(data: Path) -> None:
    samples = DataManifest.load(data).domains["letters"]["train"].samples
    dataset = MixedDataset(PreparedData(data), global_batch_size=1, weights={"letters": 1}, seed=0)
    iterator = iter(dataset)
    seen = [tuple(next(iterator)["input_ids"].tolist()) for _ in range(2 * samples)]
    assert sorted(seen[:samples]) == sorted(seen[samples:]) and seen[:samples] != seen[samples:]


def test_evaluation_takes_evenly_from_every_domain(data: Path) -> None:
    everything, some = EvalDataset(PreparedData(data)), EvalDataset(PreparedData(data), samples_per_domain=2)
    assert [some[i]["domain"].item() for i in range(len(some))] == [0, 0, 1, 1]
    manifest = DataManifest.load(data)
    assert len(everything) == sum(manifest.domains[domain]["eval"].samples for domain in manifest.domains)
    assert everything.domains == ["letters", "numbers"] and everything.domains_present == [0, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_found_when_a_shard_is_read(data: Path, tmp_path: Path, workers: int) -> None:
    """One bit, without a change of size; the worker's message comes through as it is."""
    copy = shutil.copytree(data, tmp_path / "copy")
    shard = next((copy / "numbers" / "train").glob("*.mds"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{re.escape(str(shard))} is damaged \(its xxh64 .*again$"):
        stream(copy, 3, workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_vanish_during_a_run(data: Path, tmp_path: Path, workers: int) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    dataset = MixedDataset(PreparedData(copy), global_batch_size=BATCH, weights=WEIGHTS, seed=3)
    loader = iter(DataLoader(dataset, batch_size=BATCH, num_workers=workers))
    next(loader)
    shutil.rmtree(copy / "letters")
    with pytest.raises(UserError, match=r"^.*letters.* can't be read any more \(No such file or directory\): put"):
        [next(loader) for _ in range(20)]


def test_mistakes_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prepared data"):
        EvalDataset(PreparedData(tmp_path))
    with pytest.raises(UserError, match="'leters'.*did you mean 'letters'"):
        MixedDataset(PreparedData(data), global_batch_size=1, weights={"leters": 1.0}, seed=0)
    copy = shutil.copytree(data, tmp_path / "copy")
    shard = next((copy / "letters" / "train").glob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match="cut short"):
        MixedDataset(PreparedData(copy), global_batch_size=1, weights=None, seed=0)
    shutil.rmtree(copy / "letters")
    with pytest.raises(UserError, match="moved or never prepared"):
        MixedDataset(PreparedData(copy), global_batch_size=1, weights=None, seed=0)
    (copy / "manifest.json").write_text('{"schema": 2, "domains": {"a": 3}}')
    with pytest.raises(UserError, match="not a data manifest"):
        DataManifest.load(copy)


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("encoding", ["pkl", "pkl:x", "json", "jpeg", "list[pil]", "str", "unheard", "ndarrayx", 7])
def test_shards_of_other_encodings_are_refused_unread(data: Path, tmp_path: Path, encoding: Any) -> None:
    """None of their decoders runs, whatever an index says."""
    copy = shutil.copytree(data, tmp_path / "copy")
    folder = copy / "letters" / "train"
    shutil.rmtree(folder)
    with MDSWriter(out=str(folder), columns={"tokens": "pkl"}, hashes=["xxh64"]) as writer:
        for _ in range(9):
            writer.write({"tokens": Payload(tmp_path / "executed")})
    assert not (tmp_path / "executed").exists()
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        shard["column_encodings"] = [encoding]
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"letters/train/index.json is damaged \(.*prepare the data again$"):
        stream(copy, 1)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column_names": ["other", "starts"]}, "the column 'other'"),
        ({"compression": "rar"}, "no compression 'rar'"),
    ],
)
def test_shards_that_are_otherwise_strange_are_refused(
    data: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    path = copy / "letters" / "train" / "index.json"
    index = json.loads(path.read_text())
    index["shards"][0] |= change
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"letters/train/index.json is damaged .*({message})"):
        stream(copy, 1)


def test_shards_of_other_formats_are_refused(data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    shutil.rmtree(copy / "letters" / "train")
    with JSONWriter(out=str(copy / "letters" / "train"), columns={"tokens": "int"}) as writer:
        writer.write({"tokens": 3})
    with pytest.raises(UserError, match=r"index.json is damaged \(a shard is not of the format mds\)"):
        stream(copy, 1)
