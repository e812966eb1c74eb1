"""The training stream and the evaluation samples, read from real shards."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from llmprune.data.dataset import EvalDataset, MixedDataset
from llmprune.data.format import DataManifest
from llmprune.errors import UserError

BATCH = 8


def stream(
    data: Path, batches: int, *, rank: int = 0, ranks: int = 1, workers: int = 0, start: int = 0
) -> list[list[int]]:
    """The samples of one rank's batches, each flattened to a list with its domain at the end."""
    dataset = MixedDataset(
        data, global_batch_size=BATCH, weights={"numbers": 0.6, "letters": 0.4}, seed=3, rank=rank, world_size=ranks
    )
    dataset.load_state_dict(dataset.state_dict(start * BATCH, True))
    loader = iter(DataLoader(dataset, batch_size=BATCH // ranks, num_workers=workers))
    rows = []
    for _ in range(batches):
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
    assert stream(data, 4, start=5, workers=2) == stream(data, 9)[5 * BATCH :]


def test_proportions_are_those_asked_for(data: Path) -> None:
    domains = [row[-1] for row in stream(data, 10)]
    assert abs(domains.count(1) - 0.6 * 80) < 1  # domains are numbered alphabetically


def test_one_epoch_has_no_sample_twice(data: Path) -> None:
    samples = DataManifest.load(data).domains["letters"]["train"].samples
    dataset = MixedDataset(data, global_batch_size=1, weights={"letters": 1}, seed=0)
    iterator = iter(dataset)
    seen = [tuple(next(iterator)["input_ids"].tolist()) for _ in range(2 * samples)]
    assert sorted(seen[:samples]) == sorted(seen[samples:]) and seen[:samples] != seen[samples:]


def test_evaluation_takes_evenly_from_every_domain(data: Path) -> None:
    everything, some = EvalDataset(data), EvalDataset(data, samples_per_domain=2)
    assert [some[i]["domain"].item() for i in range(len(some))] == [0, 0, 1, 1]
    manifest = DataManifest.load(data)
    assert len(everything) == sum(manifest.domains[domain]["eval"].samples for domain in manifest.domains)
    assert everything.domains == ["letters", "numbers"] and everything.domains_present == [0, 1]


def test_mistakes_are_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prepared data"):
        EvalDataset(tmp_path)
    with pytest.raises(UserError, match="'leters'.*did you mean 'letters'"):
        MixedDataset(data, global_batch_size=1, weights={"leters": 1.0}, seed=0)
    copy = shutil.copytree(data, tmp_path / "copy")
    shard = next((copy / "letters" / "train").glob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match="cut short"):
        MixedDataset(copy, global_batch_size=1, weights=None, seed=0)
    shutil.rmtree(copy / "letters")
    with pytest.raises(UserError, match="moved or never prepared"):
        MixedDataset(copy, global_batch_size=1, weights=None, seed=0)
    (copy / "manifest.json").write_text('{"schema": 1, "domains": {"a": 3}}')
    with pytest.raises(UserError, match="not a data manifest"):
        DataManifest.load(copy)
