"""The built-in corpus and the tokenizer, through the command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep.__main__ import app
from data_prep.builtin import DOMAINS
from data_prep.tokenizer import train_tokenizer
from llmprune.data.format import DataManifest
from llmprune.errors import UserError


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
