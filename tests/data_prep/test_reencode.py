"""Prepared data with another tokenizer: the same texts, domains and splits."""

from pathlib import Path

import pytest

from data_prep.pack import prepare
from data_prep.recipe import PackSettings
from data_prep.reencode import reencode
from data_prep.tokenizer import train_tokenizer
from llmprune.data.prepared import PreparedData
from llmprune.models.loading import load_tokenizer
from llmprune.utils.errors import UserError


def texts(data: Path) -> dict[tuple[str, str], str]:
    """The text of every domain and split, in order."""
    prepared = PreparedData(data)
    tokenizer = load_tokenizer(prepared.tokenizer)
    found = {}
    for domain in prepared.manifest.domains:
        for split in ("train", "eval"):
            reader = prepared.reader(domain, split)
            places = [(shard, n) for shard, count in enumerate(reader.shard_sizes) for n in range(count)]
            tokens = [token for place in places for token in reader.read(*place)["input_ids"].tolist()]
            found[domain, split] = tokenizer.decode(tokens)
    return found


@pytest.mark.parametrize(("bos", "eos"), [(False, True), (True, False), (False, False)])
def test_texts_domains_and_splits_stay(corpus: Path, tmp_path: Path, bos: bool, eos: bool) -> None:
    for name, size in (("large", 340), ("small", 270)):
        train_tokenizer([corpus], tmp_path / name, vocab_size=size)
    settings = PackSettings(32, eval_fraction=0.2, bos=bos, eos=eos)
    prepare([corpus], tmp_path / "large", tmp_path / "before", settings, processes=1)
    reencode(tmp_path / "before", tmp_path / "small", tmp_path / "after", processes=1)
    before, after = texts(tmp_path / "before"), texts(tmp_path / "after")
    assert before.keys() == after.keys()
    for key, text in before.items():
        assert len(after[key]) > 0.9 * len(text)  # the last, incomplete sample is dropped
        assert text.startswith(after[key][: len(text)][:-40])
    manifests = [PreparedData(tmp_path / name).manifest for name in ("before", "after")]
    assert manifests[0].sequence_length == manifests[1].sequence_length
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_mistakes(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="would delete the input"):
        reencode(data, data / "tokenizer", data, overwrite=True)
