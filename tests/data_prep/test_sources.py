"""Reading documents of every format, and records that can't be read."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from data_prep.sources import BadRecord, Document, Fields, clean_name, documents, find_files
from llmprune.errors import UserError


def read(*inputs: Path, **fields: str) -> list[Document | BadRecord]:
    return list(documents(find_files(inputs), Fields(**fields)))


def pairs(*inputs: Path, **fields: str) -> list[tuple[str, str]]:
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
    ("name", "clean"), [("../../etc", "_.._etc"), ("..", "unnamed"), ("a b/c", "a_b_c"), ("", "unnamed")]
)
def test_domain_names_are_safe_folder_names(name: str, clean: str) -> None:
    assert clean_name(name) in (clean, clean.lstrip("."))
    assert "/" not in clean_name(name) and not clean_name(name).startswith(".")


def test_unreadable_records_are_named(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b"{oops",
        b'{"txt": 1}',
        b'{"text": 7}',
        b'{"text": "\xff"}',
        b"",
        b'{"text": "also"}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    found = read(tmp_path / "x.jsonl")
    bad = [(item.place.rpartition(":")[2], item.reason) for item in found if isinstance(item, BadRecord)]
    assert [place for place, _ in bad] == ["2", "3", "4", "5"]
    assert "no field 'text'" in bad[1][1] and "is no string" in bad[2][1]
    assert len([item for item in found if isinstance(item, Document)]) == 2


def test_a_damaged_archive_keeps_what_was_read(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"{n} " * 200}) + "\n" for n in range(500)).encode()
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines)[:-50])
    found = read(tmp_path / "x.jsonl.gz")
    assert isinstance(found[-1], BadRecord) and "damaged" in found[-1].reason
    assert isinstance(found[0], Document)


def test_inputs_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        find_files([tmp_path / "missing"])
    with pytest.raises(UserError, match="no readable files"):
        find_files([tmp_path])
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="no known format"):
        find_files([tmp_path / "x.parquet"])
