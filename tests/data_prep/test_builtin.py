"""The built-in corpus and the tokenizer, through the command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep.__main__ import app
from data_prep.builtin import DOMAINS
from data_prep.tokenizer import train_tokenizer
from llmprune.data.format import DataManifest
from llmprune.data.sources import BadRecord
from llmprune.utils.errors import UserError


def test_from_nothing_to_shards(tmp_path: Path) -> None:
    corpus, tokenizer, data = (str(tmp_path / name) for name in ("corpus", "tokenizer", "data"))
    for arguments in (
        f"corpus --out {corpus} --megabytes 0.4",
        f"tokenizer {corpus} --out {tokenizer} --vocab-size 500",
        f"tokenize {corpus} --tokenizer {tokenizer} --out {data} --sequence-length 64 --eval-fraction 0.2",
    ):
        done = CliRunner().invoke(app, arguments.split())
        assert done.exit_code == 0, done.output
    assert set(DataManifest.load(tmp_path / "data").domains) == set(DOMAINS)
    for domain in DOMAINS:
        lines = (tmp_path / "corpus" / domain / "part-000.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        assert len(texts) == len(set(texts)) >= 1 and min(map(len, texts)) >= 200


@pytest.mark.parametrize("text", ["plain", "tabs\tand\n\nlines  ", "日本語 ünïcode 🎉", "<s> </s>", "\x00\x7f"])
def test_the_tokenizer_loses_nothing(corpus: Path, tmp_path: Path, text: str) -> None:
    tokenizer = train_tokenizer([corpus], tmp_path / "t", vocab_size=300)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 300


def test_a_vocabulary_too_small_for_bytes_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose 258 or more"):
        train_tokenizer([corpus], tmp_path / "t", vocab_size=100)


def test_a_tokenizer_of_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": {"text": "some words"}}\n' * 3)
    with pytest.raises(
        UserError, match=r"no text \(3 records can't be read; .*x.jsonl:1: no field 'text'\).*--text-field"
    ):
        train_tokenizer([tmp_path / "x.jsonl"], tmp_path / "t", vocab_size=300)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="the inputs hold no text: give files"):
        train_tokenizer([tmp_path / "empty.txt"], tmp_path / "t", vocab_size=300)
    with pytest.raises(UserError, match="choose a larger --megabytes"):
        train_tokenizer([tmp_path / "x.jsonl"], tmp_path / "t", vocab_size=300, megabytes=0)
    assert not (tmp_path / "t").exists()


def test_a_tokenizer_of_another_field(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": {"text": "words words"}}\n' * 3 + "{oops\n")
    arguments = ["tokenizer", tmp_path / "x.jsonl", "--out", tmp_path / "t", "--text-field", "body.text"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0 and "x.jsonl:4" in done.stderr, done.output
    bad: list[BadRecord] = []
    trained = train_tokenizer([tmp_path], tmp_path / "u", vocab_size=300, text_field="body.text", bad=bad)
    assert "words" in trained.get_vocab() and [record.place for record in bad] == [f"{tmp_path}/x.jsonl:4"]


def test_a_tokenizer_does_not_replace_its_inputs(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.txt").write_text("words")
    with pytest.raises(UserError, match="would delete the input"):
        train_tokenizer([tmp_path / "in"], tmp_path / "in", vocab_size=300, overwrite=True)
    assert (tmp_path / "in" / "x.txt").read_text() == "words"
