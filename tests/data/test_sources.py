"""Reading documents of every format, and records that can't be read."""

import gzip
import json
import os
import random
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from datasets import Dataset as HuggingFaceDataset
from datasets import DatasetDict
from pyarrow import parquet

from llmprune.data.records import RECORD_BYTES, find_inputs
from llmprune.data.sources import BadRecord, Document, Fields, clean_name, documents
from llmprune.utils.errors import UserError
from llmprune.utils.outputs import refuse_replacing


def read(*inputs: Path | str, **fields: str) -> list[Document | BadRecord]:
    return list(documents(find_inputs(inputs), Fields(**fields)))


def pairs(*inputs: Path | str, **fields: str) -> list[tuple[str, str]]:
    return [(d.domain, d.text) for d in read(*inputs, **fields) if isinstance(d, Document)]


def test_formats_and_compressions_give_the_same_documents(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "zwei ü", "three\nlines")).encode()
    expected = ["one", "zwei ü", "three\nlines"]
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    # two frames, as parallel compressors write them
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "c.jsonl.zst").write_bytes(compress(lines[:20]) + compress(lines[20:]))
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        assert [text for _, text in pairs(tmp_path / name)] == expected, name
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"a whole\nfile"))
    assert pairs(tmp_path / "d.txt.gz") == [(tmp_path.name, "a whole\nfile")]


def test_the_domain_comes_from_folder_field_or_option(tmp_path: Path) -> None:
    (tmp_path / "web" / "deep").mkdir(parents=True)
    record = {"body": {"text": "hi"}, "meta": {"set": "ArXiv/2020"}}
    (tmp_path / "web" / "deep" / "a.jsonl").write_text(json.dumps(record))
    (tmp_path / "top.jsonl").write_text(json.dumps(record))
    assert pairs(tmp_path, text="body.text") == [(tmp_path.name, "hi"), ("web", "hi")]
    assert pairs(tmp_path, text="body.text", domain_field="meta.set") == [("ArXiv_2020", "hi")] * 2
    assert pairs(tmp_path, text="body.text", domain="mine") == [("mine", "hi")] * 2


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("../../etc", "_.._etc"),
        ("..", "unnamed"),
        ("a b/c", "a_b_c"),
        ("", "unnamed"),
        ("Ä", "Ä"),
        ("日本語/ニュース", "日本語_ニュース"),
        ("हिन्दी", "हिन्दी"),
        ("語" * 90, "語" * 33),  # file systems count bytes
    ],
)
def test_domain_names_are_safe_folder_names(name: str, clean: str) -> None:
    assert clean_name(name) in (clean, clean.lstrip("."))
    assert "/" not in clean_name(name) and not clean_name(name).startswith(".")


def test_domains_that_would_share_a_name_are_refused(tmp_path: Path) -> None:
    for domain in ("Ä", "ß", "日本", "中国"):
        (tmp_path / "apart" / domain).mkdir(parents=True)
        (tmp_path / "apart" / domain / "x.txt").write_text(domain)
    assert sorted(pairs(tmp_path / "apart")) == sorted((domain, domain) for domain in ("Ä", "ß", "日本", "中国"))
    (tmp_path / "clash" / "a b").mkdir(parents=True)
    (tmp_path / "clash" / "a b" / "x.txt").write_text("one")
    (tmp_path / "clash" / "a+b").mkdir()
    (tmp_path / "clash" / "a+b" / "x.txt").write_text("two")
    with pytest.raises(UserError, match=r"'a b' and 'a\+b' would both be named 'a_b'"):
        next(iter(documents(find_inputs([tmp_path / "clash"]), Fields())))
    assert [name for name, _ in pairs(tmp_path / "clash", domain="mine")] == ["mine"] * 2
    records = [{"text": "one", "set": "?"}, {"text": "two", "set": "!"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(UserError, match=r"'\?' and '!' would both be named '_'"):
        read(tmp_path / "x.jsonl", domain_field="set")


@pytest.mark.parametrize(("one", "other"), [("A", "a"), ("Prose", "prosE"), ("\u00c9", "e\u0301")])
def test_domains_that_differ_in_case_alone_are_refused(tmp_path: Path, one: str, other: str) -> None:
    """On file systems that ignore case they would be one folder."""
    records = [{"text": "one", "set": one}, {"text": "two", "set": other}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(UserError, match="differ in upper and lower case alone.*rename one of them, or pass --domain"):
        read(tmp_path / "x.jsonl", domain_field="set")
    for domain in (one, other):
        (tmp_path / "in" / domain).mkdir(parents=True)
        (tmp_path / "in" / domain / "x.txt").write_text(domain)
    with pytest.raises(UserError, match="differ in upper and lower case alone"):
        next(iter(documents(find_inputs([tmp_path / "in"]), Fields())))


def test_one_name_spelt_in_two_ways_is_one_domain(tmp_path: Path) -> None:
    records = [{"text": "one", "set": "\u00e9"}, {"text": "two", "set": "e\u0301"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert pairs(tmp_path / "x.jsonl", domain_field="set") == [("\u00e9", "one"), ("\u00e9", "two")]


def test_a_file_reached_in_several_ways_is_read_once(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "x.txt").write_text("one")
    (folder / "y.txt").symlink_to("x.txt")
    assert find_inputs([folder, folder / "x.txt", folder / ".." / "a"]) == find_inputs([folder / "x.txt"])
    assert find_inputs([folder])[0].path == folder / "x.txt" and find_inputs([folder])[0].folder == "a"


def test_an_output_that_holds_an_input_is_refused(tmp_path: Path) -> None:
    inputs = [tmp_path / "a" / "b" / "x.txt"]
    inputs[0].parent.mkdir(parents=True)
    (tmp_path / "link").symlink_to("a")
    for out in (tmp_path, tmp_path / "a", tmp_path / "link", tmp_path / "c" / ".." / "a" / "b", inputs[0]):
        with pytest.raises(UserError, match=r"would delete the input .*x\.txt: choose another --out"):
            refuse_replacing(out, inputs)
    for out in (tmp_path / "a" / "b" / "out", tmp_path / "a" / "x.txt", tmp_path / "a" / "b" / "x"):
        refuse_replacing(out, inputs)


def test_unreadable_records_are_named(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b"{oops",
        b'{"txt": 1}',
        b'{"text": 7}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": ' + b"[" * 200_000,
        b"",
        b'{"text": "also"}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    found = read(tmp_path / "x.jsonl")
    bad = [(item.place.rpartition(":")[2], item.reason) for item in found if isinstance(item, BadRecord)]
    assert [place for place, _ in bad] == ["2", "3", "4", "5", "6", "7"]
    assert "no field 'text'" in bad[1][1] and "is no string" in bad[2][1]
    assert len([item for item in found if isinstance(item, Document)]) == 2


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def scrambled(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0x5A for byte in data[middle : middle + 50]) + data[middle + 50 :]


@pytest.mark.parametrize("damage", [half, scrambled])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_damaged_archive_keeps_only_whole_records(
    tmp_path: Path, kind: str, suffix: str, damage: Callable[[bytes], bytes]
) -> None:
    texts = [random.Random(n).randbytes(500).hex() for n in range(1000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    packed = gzip.compress(lines) if suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress(lines)
    (tmp_path / f"x.{kind}{suffix}").write_bytes(damage(packed))
    *good, last = read(tmp_path / f"x.{kind}{suffix}")
    assert isinstance(last, BadRecord) and "damaged" in last.reason
    kept = [item for item in good if isinstance(item, Document)]
    if kind == "txt":
        assert not good
    elif damage is half:
        assert 0 < len(kept) == len(good) and [d.text for d in kept] == texts[: len(kept)]


def test_an_archive_that_is_no_deflate_stream_is_damaged(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b"some text"))
    packed[10] |= 0b110  # the first block, after the header of ten bytes, is of the reserved type
    (tmp_path / "x.txt.gz").write_bytes(packed)
    assert [type(item) for item in read(tmp_path / "x.txt.gz")] == [BadRecord]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """A limit for records that tests reach soon."""
    monkeypatch.setattr("llmprune.data.records.RECORD_BYTES", 1 << 20)
    monkeypatch.setattr("llmprune.data.sources.RECORD_BYTES", 1 << 20)
    return 1 << 20


def packed(path: Path, pieces: Iterator[bytes]) -> Path:
    """A file of these pieces, compressed as its name says."""
    kinds: dict[str, Any] = {".gz": partial(gzip.open, compresslevel=1), ".zst": zstandard.open}
    with kinds.get(path.suffix, open)(path, "wb") as file:
        for piece in pieces:
            file.write(piece)
    return path


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_record_beyond_the_limit_is_skipped(tmp_path: Path, limit: int, suffix: str) -> None:
    def line(size: int) -> bytes:
        return json.dumps({"text": "x" * (size - len('{"text": ""}') - 1)}).encode() + b"\n"

    sizes = (20, limit, limit + 1, 3 * limit, 30)
    path = packed(tmp_path / f"x.jsonl{suffix}", map(line, sizes))
    found = [len(item.text) if isinstance(item, Document) else item.reason for item in read(path)]
    refused = "it is larger than 1 MiB, the limit of a record: leave it out, or cut it"
    assert found == [7, limit - 13, refused, refused, 17]
    path = packed(tmp_path / f"y.txt{suffix}", iter([b"x" * (limit + 1)]))
    (item,) = read(path)
    assert isinstance(item, BadRecord) and item.reason.endswith("part it into several files, or make it JSON lines")
    (item,) = documents(find_inputs([path]), Fields(), text_bytes=2 * limit)
    assert isinstance(item, Document) and len(item.text) == limit


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_a_small_archive_of_a_huge_record_takes_little_memory(tmp_path: Path, kind: str, suffix: str) -> None:
    """A quarter of a gigabyte in one line."""
    path = packed(tmp_path / f"x.{kind}{suffix}", (bytes(1 << 22) for _ in range(64)))
    assert path.stat().st_size < 1 << 22
    inputs = find_inputs([path])
    tracemalloc.start()
    (item,) = documents(inputs, Fields())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(item, BadRecord) and "64 MiB" in item.reason
    assert peak < 3 * RECORD_BYTES


def test_a_text_of_parquet_beyond_the_limit_is_skipped(tmp_path: Path, limit: int) -> None:
    texts = ["one", "x" * (limit + 1), "two"]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
    found = read(tmp_path / "x.parquet")
    assert [item.text if isinstance(item, Document) else item.reason[:23] for item in found] == [
        "one",
        "it is larger than 1 MiB",
        "two",
    ]


def test_rows_of_parquet_that_are_large_are_read_few_at_a_time(tmp_path: Path, limit: int) -> None:
    """All of a row group at a time would be 40 MB here, and gigabytes elsewhere."""
    texts = [random.Random(n).randbytes(limit // 4).hex() for n in range(80)]
    table = pa.table({"text": texts})
    parquet.write_table(table, tmp_path / "x.parquet", use_dictionary=False, write_batch_size=1)  # a page for each
    del table
    before, peak = pa.total_allocated_bytes(), 0
    for item, text in zip(documents(find_inputs([tmp_path / "x.parquet"]), Fields()), texts, strict=True):
        assert isinstance(item, Document) and item.text == text
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert peak < 10 * limit


def test_what_is_neither_file_nor_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (Path("/dev/zero"), Path("/dev/null"), tmp_path / "pipe.jsonl"):
        with pytest.raises(UserError, match=f"^{path} is neither a file nor a folder"):
            find_inputs([path])
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(UserError, match=r"pipe\.jsonl is no file"):
        find_inputs([tmp_path])
    (tmp_path / "pipe.jsonl").rename(tmp_path / "socket")  # of no known format
    assert len(find_inputs([tmp_path])) == 1
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"gone\.jsonl is no file \(a pipe, a device or a link to nothing\)"):
        find_inputs([tmp_path])


def test_inputs_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        find_inputs([tmp_path / "missing"])
    with pytest.raises(UserError, match="no readable files"):
        find_inputs([tmp_path])
    (tmp_path / "x.docx").write_bytes(b"")
    with pytest.raises(UserError, match="no known format"):
        find_inputs([tmp_path / "x.docx"])


ROWS = [{"text": f"row {n} " * (n % 5 + 1), "meta": {"set": "ab"[n % 2]}, "other": n} for n in range(50)]


def write_parquet(path: Path) -> Path:
    parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=7)
    return path


def test_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet")
    expected = [("ab"[n % 2], row["text"]) for n, row in enumerate(ROWS)]
    assert pairs(path, domain_field="meta.set") == expected
    for after in (1, 6, 7, 8, 49, 50):
        found = documents(find_inputs([path]), Fields(domain_field="meta.set"), after=(0, after))
        assert [(d.domain, d.text) for d in found if isinstance(d, Document)] == expected[after:]
    (bad,) = {item.reason for item in read(path, text="body") if isinstance(item, BadRecord)}
    assert bad == "no field 'body'"
    path.write_bytes(path.read_bytes()[:-40])
    (item,) = read(path)
    assert isinstance(item, BadRecord) and "the file is damaged" in item.reason


def test_parquet_with_text_that_is_none(tmp_path: Path) -> None:
    """Its column says it is text, but not all of it is UTF-8: that row alone is bad."""
    raw = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    parquet.write_table(pa.table({"text": text}), tmp_path / "x.parquet")
    found = read(tmp_path / "x.parquet")
    assert [item.text if isinstance(item, Document) else item.place[-2:] for item in found] == ["good", ":2", "fine"]


@pytest.mark.parametrize("kind", ["saved", "files"])
def test_datasets_in_a_folder(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "my-set"
    if kind == "saved":
        DatasetDict({"train": HuggingFaceDataset.from_list(ROWS)}).save_to_disk(folder)
    else:
        folder.mkdir()
        write_parquet(folder / "train-0.parquet")
    name = f"hf:{folder}::train"
    expected = [("my-set", row["text"]) for row in ROWS]
    assert pairs(name) == expected
    after = documents(find_inputs([name]), Fields(), after=(0, 20))
    assert [d.text for d in after if isinstance(d, Document)] == [row["text"] for row in ROWS[20:]]
    parts = [replace(find_inputs([name])[0], part=(number, 3)) for number in range(3)]
    texts = [[d.text for d in documents([part], Fields()) if isinstance(d, Document)] for part in parts]
    assert sorted(text for part in texts for text in part) == sorted(row["text"] for row in ROWS) and all(texts)


def test_a_dataset_that_breaks_off_is_no_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be fetched now may be had later: the job stops, and goes on then."""

    class Broken:
        column_names = None

        def skip(self, count: int) -> Iterator[dict[str, str]]:
            yield {"text": "one"}
            raise ConnectionError("the line is cut")

    monkeypatch.setattr("llmprune.data.records._open_dataset", lambda source: Broken())
    found = documents(find_inputs(["hf:a/b"]), Fields())
    assert isinstance(next(found), Document)
    with pytest.raises(UserError, match="hf:a/b ends after record 1: the line is cut"):
        next(found)


def test_datasets_that_cannot_be_opened(tmp_path: Path) -> None:
    for name, message in (
        ("hf:nobody/nothing", "hf:nobody/nothing can't be opened"),
        (f"hf:{tmp_path}", "can't be opened"),
        ("hf:", "is no dataset: write hf:NAME"),
        ("hf:a:b:c:d", "is no dataset"),
    ):
        with pytest.raises(UserError, match=message):
            read(name)


def test_linked_folders_are_searched_once(tmp_path: Path) -> None:
    (tmp_path / "disk" / "code").mkdir(parents=True)
    (tmp_path / "disk" / "code" / "a.txt").write_text("elsewhere")
    (tmp_path / "in" / "web").mkdir(parents=True)
    (tmp_path / "in" / "web" / "b.txt").write_text("here")
    (tmp_path / "in" / "code").symlink_to(tmp_path / "disk" / "code")
    (tmp_path / "in" / "web" / "back").symlink_to(tmp_path / "in")
    assert sorted(pairs(tmp_path / "in")) == [("code", "elsewhere"), ("web", "here")]
