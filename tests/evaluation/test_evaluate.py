"""The command and the function that evaluate models: what they record and what they refuse."""

import json
import math
from pathlib import Path

import pytest
import torch

import llmprune
from llmprune.cli import app
from llmprune.evaluation.perplexity import Segmentation, measure_perplexity
from llmprune.models.loading import load_model, load_tokenizer
from llmprune.utils.errors import UserError
from tests.conftest import random_model, tiny_config


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "count.txt"
    path.write_text("3: one two three four five six one two three\n" * 30)
    return path


@pytest.fixture(scope="module")
def short_folder(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes 48 tokens."""
    folder = tmp_path_factory.mktemp("short")
    random_model(tiny_config(max_position_embeddings=48)).save_pretrained(folder)
    load_tokenizer(trained_folder).save_pretrained(folder)
    return folder


def test_what_is_recorded_by_default(trained_folder: Path, short_folder: Path, text: Path, tmp_path: Path) -> None:
    """Two models are measured over segments of the shorter one's length, without a BOS: the tokenizer adds none."""
    out = tmp_path / "results.json"
    app(
        ["evaluate", str(trained_folder), str(short_folder), "--perplexity", str(text), "--out", str(out)],
        standalone_mode=False,
    )
    models = json.loads(out.read_text())["models"]
    tokens = torch.tensor(load_tokenizer(trained_folder)(text.read_text())["input_ids"])
    for folder in (trained_folder, short_folder):
        entry = models[str(folder)]["perplexity"]["count"]
        value, bits = entry.pop("bos_none"), entry.pop("bits_per_byte")["bos_none"]
        assert entry == {
            "segment": 48,
            "stride": 48,
            "perplexity_tokens": None,
            "like": None,
            "tokens": {"bos_none": len(tokens) - math.ceil(len(tokens) / 48)},
        }
        model = load_model(folder).eval()
        losses = torch.cat(
            [
                -model(part[None]).logits[0, :-1].log_softmax(-1).gather(1, part[1:, None]).flatten()
                for part in tokens.split(48)
            ]
        )
        assert value == pytest.approx(losses.mean().exp().item(), rel=1e-4)
        assert bits == pytest.approx(math.log2(value) * len(tokens) / text.stat().st_size, rel=1e-4)


def test_options(trained_folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--perplexity-tokens", "100", "--segment", "20", "--bos", "none,each", "--batch-size", "3", "--json"]
    app(["evaluate", str(trained_folder), "--perplexity", str(text), *options], standalone_mode=False)
    printed = json.loads(capsys.readouterr().out)["models"][str(trained_folder)]["perplexity"]["count"]
    assert printed["tokens"] == {"bos_none": 95, "bos_each": 100}
    assert printed["perplexity_tokens"] == 100
    found = llmprune.evaluate(
        trained_folder, perplexity=text, perplexity_tokens=100, segment=20, bos=["none", "each"], batch_size="auto"
    )
    entry = found["models"][str(trained_folder)]["perplexity"]["count"]
    assert entry["tokens"] == printed["tokens"]
    assert [entry[name] for name in ("bos_none", "bos_each")] == [
        pytest.approx(printed[name], rel=1e-5) for name in ("bos_none", "bos_each")
    ]
    like = llmprune.evaluate(trained_folder, perplexity=text, like="shortened")
    entry = like["models"][str(trained_folder)]["perplexity"]["count"]
    assert (entry["like"], entry["segment"]) == ("shortened", 127)  # a BOS and 127 tokens, all that the model takes
    assert [name for name in entry if name.startswith("bos_")] == ["bos_once", "bos_each"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "batch_size is 0; it must be positive, or auto"),
        (["--batch-size", "some"], "batch_size 'some' is unknown; valid: auto, or a number"),
        (["--bos", "twice"], r"bos\[0\] 'twice' is unknown; valid: none, once, each"),
        (["--perplexity-tokens", "0"], "perplexity.tokens is 0; it must be at least 2"),
        (["--limit", "1.5"], "limit is 1.5; it must be a positive whole number or a share below 1"),
        (["--stride", "200"], "the stride must be at most the segment's 128 tokens; got 200"),
        (["--seed", "-1"], "generation.seed is -1"),
        (["--prompt-share", "1"], r"prompt_share is 1.0; it must lie in \(0, 1\)"),
        (["--like", "shortened", "--segment", "100", "--perplexity-tokens", "99"], "make no whole segment of 100"),
    ],
)
def test_mistakes(trained_folder: Path, text: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        app(["evaluate", str(trained_folder), "--perplexity", str(text), *options], standalone_mode=False)


def test_a_bar_counts_segments(
    trained_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal alone: a bar in a log file would fill it."""
    model, tokens = load_model(trained_folder).eval(), torch.arange(100)

    def run() -> str:
        measure_perplexity(model, tokens, Segmentation(10, 10), "none", bos=None, batch_size=4, progress="a text")
        return capsys.readouterr().err

    assert run() == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert "a text" in (bar := run()) and "10/10" in bar
