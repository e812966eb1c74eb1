"""Data at a URL, in another folder, or compressed: read through a cache."""

import contextlib
import json
import os
import shutil
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import boto3
import pytest
from streaming.base.compression import compress
from streaming.base.storage.download import CloudDownloader
from torch.utils.data import DataLoader

from data_prep.describe import show_samples
from data_prep.pack import prepare
from data_prep.recipe import PackSettings
from llmprune.data import cache as caching
from llmprune.data.cache import CacheConfig
from llmprune.data.dataset import EvalDataset, MixedDataset
from llmprune.data.prepared import PreparedData
from llmprune.data.unpacking import unpack
from llmprune.utils.errors import UserError

WEIGHTS = {"numbers": 0.6, "letters": 0.4}


@pytest.fixture(scope="module")
def shards(corpus: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus in a few dozen shards of four samples."""
    folder = tmp_path_factory.mktemp("shards") / "mds"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_prep.shards._SHARD_BYTES", 4 * 32 * 2)
        prepare([corpus], data / "tokenizer", folder, PackSettings(32, eval_fraction=0.2), processes=1)
    assert len(list(folder.rglob("train/*.mds"))) > 20
    return folder


@pytest.fixture
def bucket(s3: str, shards: Path) -> str:
    """A copy of the data in an S3-compatible store."""
    client = boto3.client("s3", endpoint_url=s3)
    client.create_bucket(Bucket="corpora")
    for path in shards.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "corpora", f"prepared/{path.relative_to(shards)}")
    return "s3://corpora/prepared"


def stream(data: PreparedData, batches: int, *, workers: int = 0, **options: Any) -> list[list[int]]:
    dataset = MixedDataset(data, global_batch_size=8, weights=WEIGHTS, seed=3, shuffle_window=2, **options)
    loader = iter(DataLoader(dataset, batch_size=8 // options.get("world_size", 1), num_workers=workers))
    return [row for _ in range(batches) for row in next(loader)["input_ids"].tolist()]


def cached(folder: Path) -> set[str]:
    """The shards of training in a cache, without the folder that is named after the data."""
    return {str(path.relative_to(folder).parts[1:]) for path in folder.rglob("train/*.mds")}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_gives_the_samples_of_the_folder(bucket: str, shards: Path, tmp_path: Path, workers: int) -> None:
    expected = stream(PreparedData(shards), 30)
    data = PreparedData(bucket, CacheConfig(str(tmp_path)))
    assert stream(data, 30, workers=workers) == expected
    assert len(EvalDataset(data)) == len(EvalDataset(PreparedData(shards)))
    assert [s.text for s in show_samples(data, 2)] == [s.text for s in show_samples(PreparedData(shards), 2)]
    assert not list(tmp_path.rglob("*.part"))


def test_another_folder_may_be_the_remote(shards: Path, tmp_path: Path) -> None:
    data = PreparedData(shards, CacheConfig(str(tmp_path)))
    assert stream(data, 10) == stream(PreparedData(shards), 10)
    assert cached(tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_compressed_data_are_read_through_a_cache(
    corpus: Path, data: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("data_prep.shards._SHARD_BYTES", 4 * 32 * 2)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    settings = PackSettings(32, eval_fraction=0.2, compression="zstd")
    prepare([corpus], data / "tokenizer", tmp_path / "packed", settings, processes=1)
    assert stream(PreparedData(tmp_path / "packed"), 20, workers=workers) == stream(PreparedData(shards), 20)
    assert not list((tmp_path / "packed").rglob("*.mds"))


def test_a_limited_cache_makes_room(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds what is read in turns; what is read again is fetched again."""
    expected = stream(PreparedData(shards), 60)
    size = max(path.stat().st_size for path in shards.rglob("*.mds"))
    most, make_room = 0, caching.ShardCache._make_room

    def watched(self: caching.ShardCache, wanted: int) -> None:
        nonlocal most
        make_room(self, wanted)
        held = 0
        for path in tmp_path.rglob("*.mds"):
            with contextlib.suppress(FileNotFoundError):  # the background makes room, too
                held += path.stat().st_size
        most = max(most, wanted + held)

    monkeypatch.setattr(caching.ShardCache, "_make_room", watched)
    limit = 9 * size
    assert stream(PreparedData(shards, CacheConfig(str(tmp_path), str(limit))), 60) == expected
    assert 5 * size < most <= limit + size  # one may be under way in the background
    with pytest.raises(UserError, match=r"data.cache.limit leaves .* bytes, but up to .* are in use"):
        stream(PreparedData(shards, CacheConfig(str(tmp_path), str(2 * size))), 1)
    with pytest.raises(UserError, match="'lots' is no size: write 500mb"):
        PreparedData(shards, CacheConfig(str(tmp_path), "lots"))


def test_shards_are_fetched_before_they_are_needed(shards: Path, tmp_path: Path) -> None:
    data = PreparedData(shards, CacheConfig(str(tmp_path)))
    iterator = iter(MixedDataset(data, global_batch_size=8, weights=WEIGHTS, seed=3, shuffle_window=2))
    for _ in range(8):
        next(iterator)
    for _ in range(100):
        if len(cached(tmp_path)) >= 8:  # two windows of two shards of each domain
            break
        time.sleep(0.05)
    assert len(cached(tmp_path)) == 8


def test_machines_read_shards_of_their_own(shards: Path, tmp_path: Path) -> None:
    """All they have in common is the shard that is cut in two, one in each domain."""
    expected = stream(PreparedData(shards), 40, partitions=2)
    parts = []
    for machine in range(2):
        data = PreparedData(shards, CacheConfig(str(tmp_path / str(machine))))
        parts.append(stream(data, 40, rank=machine, world_size=2, machines=2, partitions=2))
    assert [row for i in range(0, 160, 4) for part in parts for row in part[i : i + 4]] == expected
    common = cached(tmp_path / "0") & cached(tmp_path / "1")
    assert len(common) <= 2 and len(cached(tmp_path / "0")) > 10


def test_a_file_is_fetched_once_however_many_want_it(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    download = caching.download_file

    def slow(url: str, path: Path, downloader: CloudDownloader) -> None:
        fetched.append(url)
        time.sleep(0.02)
        download(url, path, downloader)

    monkeypatch.setattr(caching, "download_file", slow)
    readers = [PreparedData(shards, CacheConfig(str(tmp_path))).reader("letters", "train") for _ in range(4)]
    threads = [threading.Thread(target=reader.read, args=(shard, 0)) for reader in readers for shard in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == len(set(fetched)) == 4  # the index and three shards


def test_damage_at_the_source_is_named_and_damage_on_this_machine_is_mended(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    data = PreparedData(copy, CacheConfig(str(tmp_path / "cache")))
    expected = data.reader("letters", "train").read(0, 0)["input_ids"].tolist()
    (held,) = (tmp_path / "cache").rglob("*.mds")
    held.write_bytes(held.read_bytes()[:-5])
    assert data.reader("letters", "train").read(0, 0)["input_ids"].tolist() == expected
    damaged = copy / "letters" / "train" / "shard.00001.mds"
    damaged.write_bytes(b"\0" + damaged.read_bytes()[1:])
    with pytest.raises(UserError, match=r"shard.00001.mds is damaged \(its xxh64"):
        data.reader("letters", "train").read(1, 0)
    damaged.unlink()
    with pytest.raises(UserError, match="shard.00001.mds can't be fetched"):
        data.reader("letters", "train").read(1, 0)
    assert len(list((tmp_path / "cache").rglob("*.mds"))) == 1


@pytest.mark.parametrize("location", ["folder", "s3"])
def test_a_shard_of_another_size_than_its_index_says(
    shards: Path, s3: str, bucket: str, tmp_path: Path, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Larger or smaller at its source: it is refused unread, and nothing of it stays in the cache."""
    copy, client = shutil.copytree(shards, tmp_path / "copy"), boto3.client("s3", endpoint_url=s3)
    remote = bucket if location == "s3" else str(copy)
    data = PreparedData(remote, CacheConfig(str(tmp_path / "cache")))
    data.reader("letters", "train").read(0, 0)  # the index is here
    whole = (copy / "letters" / "train" / "shard.00001.mds").read_bytes()
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} is read"))
    for content, message in ((whole + b"x" * 1000, "is another file than its index"), (whole[:-1], "is cut short")):
        (copy / "letters" / "train" / "shard.00001.mds").write_bytes(content)
        client.put_object(Bucket="corpora", Key="prepared/letters/train/shard.00001.mds", Body=content)
        with pytest.raises(UserError, match=rf"shard.00001.mds {message} .*{len(content):,} bytes, not {len(whole):,}"):
            data.reader("letters", "train").read(1, 0)
    assert not list((tmp_path / "cache").rglob("*00001.mds")) and not list((tmp_path / "cache").rglob("*.part"))


@pytest.mark.parametrize("size", [10**15, 0, -1])
def test_an_index_may_not_announce_what_no_shard_can_be(shards: Path, tmp_path: Path, size: int) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    index = copy / "letters" / "train" / "index.json"
    described = json.loads(index.read_text())
    described["shards"][0]["raw_data"]["bytes"] = size
    index.write_text(json.dumps(described))
    with pytest.raises(UserError, match=rf"is damaged \(.* can't have {size} bytes"):
        PreparedData(copy, CacheConfig(str(tmp_path / "cache"))).reader("letters", "train")


def test_a_compressed_shard_that_holds_more_than_its_index_says(
    corpus: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.shards._SHARD_BYTES", 4 * 32 * 2)
    packed = tmp_path / "packed"
    prepare([corpus], data / "tokenizer", packed, PackSettings(32, compression="zstd"), processes=1)
    index = packed / "letters" / "train" / "index.json"
    described = json.loads(index.read_text())
    shard = described["shards"][0]
    bomb = compress("zstd:3", bytes(2**28))
    (index.parent / shard["zip_data"]["basename"]).write_bytes(bomb)
    shard["zip_data"].update(bytes=len(bomb), hashes={})
    index.write_text(json.dumps(described))
    reader = PreparedData(packed, CacheConfig(str(tmp_path / "cache"))).reader("letters", "train")
    with pytest.raises(UserError, match="holds more than the .* bytes that its index says"):
        reader.read(0, 0)


@pytest.mark.parametrize("algorithm", ["br:3", "bz2:1", "gz:1", "snappy", "zstd:3"])
def test_no_more_is_unpacked_than_was_announced(algorithm: str) -> None:
    content = os.urandom(1000) * 100
    assert unpack(algorithm, compress(algorithm, content), len(content), "x") == content
    if algorithm == "zstd:3":  # several frames are one content
        assert unpack(algorithm, compress(algorithm, content) * 2, 2 * len(content), "x") == content * 2
    with pytest.raises(UserError, match="x holds 100,000 of the 100,001 bytes"):
        unpack(algorithm, compress(algorithm, content), 100_001, "x")
    with pytest.raises(UserError, match="x can't be decompressed|x holds more"):
        unpack(algorithm, b"\x80junk" * 10, 100, "x")
    bomb = compress(algorithm, bytes(2**26))
    tracemalloc.start()
    with pytest.raises(UserError, match="x holds more than the 1,000 bytes"):
        unpack(algorithm, bomb, 1000, "x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**24


def test_what_a_killed_process_left_is_in_nobodys_way(shards: Path, tmp_path: Path) -> None:
    data = PreparedData(shards, CacheConfig(str(tmp_path)))
    reader = data.reader("letters", "train")
    target = next(tmp_path.rglob("letters/train")) / "shard.00000.mds"
    target.with_name("shard.00000.mds.part").write_bytes(b"half")
    target.with_name("shard.00000.mds.lock").write_bytes(b"")
    assert (
        reader.read(0, 0)["input_ids"].tolist()
        == PreparedData(shards).reader("letters", "train").read(0, 0)["input_ids"].tolist()
    )


@pytest.mark.usefixtures("s3")
def test_a_remote_that_cannot_be_reached(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CacheConfig(str(tmp_path))
    with pytest.raises(UserError, match="s3://corpora/other/manifest.json can't be fetched: .*not found"):
        PreparedData("s3://corpora/other", cache)
    with pytest.raises(UserError, match="ftps://x/manifest.json can't be fetched: Unsupported remote path"):
        PreparedData("ftps://x", cache)
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="can't be fetched: Could not connect"):
        PreparedData(bucket, cache)


def test_an_index_may_not_name_files_elsewhere(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    index = copy / "letters" / "train" / "index.json"
    index.write_text(index.read_text().replace("shard.00000.mds", "../../../../secret"))
    with pytest.raises(UserError, match=r"is damaged \(a shard is outside"):
        PreparedData(copy).reader("letters", "train")


def test_a_cache_that_cannot_be_written(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write the cache"):
        PreparedData(shards, CacheConfig(str(tmp_path / "file"))).reader("letters", "train")
    assert os.listdir(tmp_path) == ["file"]
