"""Calibration samples from text, JSON lines and prepared data."""

import json
from pathlib import Path

import pytest
import torch

from llmprune.data.calibration import calibration_samples, with_length
from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.data.dataset import MixedDataset
from llmprune.data.prepared import PreparedData
from llmprune.models.loading import load_tokenizer
from llmprune.utils.errors import UserError


def test_text_is_cut_into_samples_in_order(data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(data / "tokenizer")
    texts = ["one two three four five six " * 3, "alpha beta gamma delta " * 4]
    with (tmp_path / "text.jsonl").open("w") as file:
        for text in texts:
            file.write(json.dumps({"body": text}) + "\n")
    stream = [i for t in texts for i in [*tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
    config = CalibrationConfig(str(tmp_path / "text.jsonl"), samples=3, length=8, text_field="body")
    assert calibration_samples(config, tokenizer).flatten().tolist() == stream[:24]
    bos = tokenizer.bos_token_id
    config.bos = "each"
    each = calibration_samples(config, tokenizer)
    assert each.shape == (3, 8) and (each[:, 0] == bos).all() and each[:, 1:].flatten().tolist() == stream[:21]
    config.bos = "first"
    first = calibration_samples(config, tokenizer)
    assert first[0].tolist() == [bos, *stream[:7]] and first[1].tolist() == stream[8:16]


def test_prepared_data_give_training_samples(data: Path) -> None:
    tokenizer = load_tokenizer(data / "tokenizer")
    samples = calibration_samples(CalibrationConfig(str(data), samples=6, length=16, seed=3), tokenizer)
    stream = iter(MixedDataset(PreparedData(data), global_batch_size=6, weights=None, seed=3))
    assert samples.tolist() == [next(stream)["input_ids"][:16].tolist() for _ in range(6)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples is 0; it must be positive"),
        ({"length": 4}, "length is 4; it must be at least 8"),
        ({"bos": "all"}, "bos 'all' is unknown; valid: none, first, each"),
        ({"path": None}, "need calibration text"),
        ({"path": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"length": 64}, "have 32 tokens"),
        ({"samples": 100000}, "ask for"),
    ],
)
def test_mistakes(data: Path, changes: dict[str, object], message: str) -> None:
    config = CalibrationConfig(**{"path": str(data), "samples": 2, "length": 16, **changes})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        calibration_samples(config, load_tokenizer(data / "tokenizer"))


def test_text_shorter_than_a_sample(data: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("one two")
    config = CalibrationConfig(str(tmp_path / "short.txt"), samples=1, length=32)
    with pytest.raises(UserError, match="text for 0 samples of 32 tokens"):
        calibration_samples(config, load_tokenizer(data / "tokenizer"))


def test_only_the_beginning_of_a_long_text_is_read(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples as from all of it, and a character that is cut in two does no harm."""
    tokenizer = load_tokenizer(data / "tokenizer")
    (tmp_path / "long.txt").write_text("añ€😀 one two three alpha beta " * 4000)
    config = CalibrationConfig(str(tmp_path / "long.txt"), samples=3, length=20)
    found = calibration_samples(config, tokenizer)
    whole = tokenizer((tmp_path / "long.txt").read_text(), add_special_tokens=False)["input_ids"]
    assert found.flatten().tolist() == whole[:60]
    for size in range(31, 47):
        monkeypatch.setattr("llmprune.data.calibration.BYTES_PER_TOKEN", size)
        assert torch.equal(calibration_samples(config, tokenizer), found)


def test_samples_of_one_document_of_many_are_told(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(data / "tokenizer")
    (tmp_path / "a.jsonl").write_text('{"text": "' + "one two three " * 100 + '"}\n{"text": "four"}\n')
    (tmp_path / "b.txt").write_text("one two three " * 100)
    few, all_of_it = (CalibrationConfig(str(tmp_path / "a.jsonl"), samples, 8) for samples in (2, 10**6))
    calibration_samples(few, tokenizer)
    assert "all calibration samples are of the first document of" in caplog.text
    caplog.clear()
    calibration_samples(CalibrationConfig(str(tmp_path / "b.txt"), 2, 8), tokenizer)  # there is no other
    with pytest.raises(UserError, match="has text for"):
        calibration_samples(all_of_it, tokenizer)
    assert not caplog.text


def test_the_length_follows_the_model_and_the_data(data: Path, tmp_path: Path) -> None:
    text = CalibrationConfig(str(tmp_path / "text.txt"))
    assert [with_length(text, longest).length for longest in (None, 128, 4096)] == [512, 128, 512]
    prepared = CalibrationConfig(str(data), samples=2)
    assert with_length(prepared, None).length == 32  # of the data's samples
    assert with_length(CalibrationConfig(str(data), length=9), 8).length == 9
    assert calibration_samples(prepared, load_tokenizer(data / "tokenizer")).shape == (2, 32)
