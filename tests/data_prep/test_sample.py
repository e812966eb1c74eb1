"""Text that a model writes: the same however often the job was stopped and by whomever it was done."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep import sample as module
from data_prep.pack import prepare
from data_prep.recipe import PackSettings
from data_prep.sample import SampleConfig, TextWriter, ending_tokens, repeats, sample, temperatures
from llmprune.data.prepared import PreparedData
from llmprune.models.loaded import LoadedModel
from llmprune.models.loading import load_model, load_tokenizer
from llmprune.utils.errors import UserError
from tests.conftest import random_model, tiny_config

# Three files: 4 batches of 2 texts of 20 tokens each, the last one smaller.
CONFIG = SampleConfig(tokens=400, length=20, batch_size=2, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def written(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "text"
    sample(str(trained_folder), out, CONFIG)
    return out


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.glob("*.json*"))}


def test_files_are_text_and_tokens_are_counted(written: Path, trained_folder: Path) -> None:
    found = files(written)
    assert [*found] == ["part-00000.jsonl", "part-00001.jsonl", "part-00002.jsonl", "sample.json"]
    facts = json.loads(found.pop("sample.json"))
    assert facts["settings"]["model"] == str(trained_folder)
    texts = [json.loads(line)["text"] for content in found.values() for line in content.splitlines()]
    assert len(texts) == facts["counts"]["texts"] > 15
    assert len(set(texts)) > 0.8 * len(texts) and all(text.strip() for text in texts)
    assert 400 <= facts["counts"]["tokens"] <= 420  # in 20 rows, in each of which one text may be cut
    tokenizer = load_tokenizer(trained_folder)
    assert not any(token in text for token in tokenizer.all_special_tokens for text in texts)
    assert all(len(tokenizer(text)["input_ids"]) <= 22 for text in texts)  # cut text may be split in another way


def test_the_result_becomes_training_data(written: Path, trained_folder: Path, tmp_path: Path) -> None:
    prepare([written], trained_folder, tmp_path / "data", PackSettings(16, eval_fraction=0.1), processes=1)
    prepared = PreparedData(tmp_path / "data")
    assert [*prepared.manifest.domains] == ["text"]  # the folder's name
    assert 350 / 16 < sum(prepared.manifest.samples("text", split) for split in ("train", "eval")) < 450 / 16


def test_a_stopped_job_goes_on_to_the_same_files(
    written: Path, trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    whole = TextWriter.file

    def stopping(self: TextWriter, number: int, progress: object = None) -> object:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(number)
        return whole(self, number, progress)  # type: ignore[arg-type]

    out = tmp_path / "text"
    monkeypatch.setattr(TextWriter, "file", stopping)
    with pytest.raises(KeyboardInterrupt):
        sample(str(trained_folder), out, CONFIG)
    assert not out.exists() and [path.name for path in (tmp_path / ".text.sample").glob("part*l")] == [
        "part-00000.jsonl"
    ]
    with pytest.raises(UserError, match="other settings"):
        sample(str(trained_folder), out, SampleConfig(tokens=401, length=20))
    first = (tmp_path / ".text.sample" / "part-00000.jsonl").stat().st_mtime_ns
    monkeypatch.setattr(TextWriter, "file", whole)
    monkeypatch.setattr(module, "write_json", stopping)  # at its very end
    with pytest.raises(KeyboardInterrupt):
        sample(str(trained_folder), out, CONFIG)
    assert not out.exists()
    monkeypatch.undo()
    sample(str(trained_folder), out, CONFIG)
    assert files(out) == files(written)
    assert (out / "part-00000.jsonl").stat().st_mtime_ns == first  # it was kept
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_ranks_and_a_kill_write_the_same(written: Path, trained_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "text"
    options = {"tokens": 400, "length": 20, "batch-size": 2, "dtype": "float32", "device": "cpu", "out": out}
    settings = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "data_prep", "sample", str(trained_folder), *settings]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    ranks = [
        subprocess.Popen(command, env={**environment, "LOCAL_RANK": rank, "RANK": rank, "WORLD_SIZE": "2"})
        for rank in "01"
    ]
    deadline = time.monotonic() + 240
    while not list((tmp_path / ".text.sample").glob("*.lock")):  # it has begun a file
        assert ranks[0].poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    ranks[0].send_signal(signal.SIGKILL)
    ranks[0].wait()
    assert ranks[1].wait(timeout=240) == 0
    assert files(out) == files(written)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_files_do_not_depend_on_their_order(written: Path, trained_folder: Path) -> None:
    model, tokenizer = load_model(trained_folder).eval(), load_tokenizer(trained_folder)
    writer = TextWriter(LoadedModel("model", trained_folder, model, tokenizer), CONFIG)
    for number in (2, 0, 1):
        texts, _ = writer.file(number, lambda tokens: None)
        lines = (written / f"part-0000{number}.jsonl").read_text().splitlines()
        assert texts == [json.loads(line)["text"] for line in lines]
    assert len({path.read_text() for path in written.glob("part*")}) == 3


def test_temperature_falls_as_by_hand() -> None:
    config = SampleConfig(tokens=1, temperature_start=2.0, temperature=0.5, fall=3)
    naive = [2.0, 2.0 - 0.5, 2.0 - 1.0, 0.5, 0.5, 0.5]
    assert temperatures(torch.arange(6), config).tolist() == pytest.approx(naive)
    assert set(temperatures(torch.arange(6), SampleConfig(tokens=1, temperature=0.5)).tolist()) == {0.5}


@pytest.mark.parametrize("first_token", ["random", "sampled"])
@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_neox", "mistral", "gemma2"])
def test_a_text_within_a_row_is_as_if_alone(
    model_type: str,
    first_token: Literal["random", "sampled"],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every token is drawn by the logits of a pass over its text alone, at the text's own temperature."""
    window = {"sliding_window": 8} if model_type in ("mistral", "gemma2") else {}
    model = random_model(tiny_config(model_type, eos_token_id=1, pad_token_id=1, **window))
    tokenizer = load_tokenizer(data / "tokenizer")
    config = SampleConfig(1, 24, first_token, temperature=1.0, temperature_start=3.0, fall=4)
    writer = TextWriter(LoadedModel("model", tmp_path, model, tokenizer), config)
    # A third of all tokens end a text, so that rows hold several.
    writer._ends = torch.arange(model.config.vocab_size) % 3 == 2
    seen: list[torch.Tensor] = []

    def draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seen.append(logits.clone())
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]

    monkeypatch.setattr(writer, "_draw", draw)
    rows = writer._write(3, torch.Generator().manual_seed(1), lambda tokens: None)
    checked = 0
    for number, row in enumerate(rows.tolist()):
        text: list[int] = []
        for place, token in enumerate(row):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[writer._begin, *text]])).logits[0, -1]
            temperature = 3.0 - 2.0 * min(len(text), 4) / 4
            allowed = ~writer._ends if not text else torch.ones_like(writer._ends)
            found = seen[place][number]
            if first_token == "random" and not text:
                logits = torch.zeros_like(logits)
            elif first_token == "random" and len(text) <= 3:
                assert token == logits.argmax()
            torch.testing.assert_close(found[allowed], (logits / temperature)[allowed], rtol=1e-4, atol=1e-4)
            assert found[~allowed].isinf().all()
            text = [] if writer._ends[token] else [*text, token]
            checked += not text
    assert checked > 10


def test_special_tokens_and_unknown_ones_end_a_text(data: Path) -> None:
    tokenizer = load_tokenizer(data / "tokenizer")
    model = random_model(tiny_config(vocab_size=310))
    ends = ending_tokens(tokenizer, model)
    special = {tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    assert {i for i in range(310) if ends[i]} == special | set(range(len(tokenizer), 310))


def test_texts_in_circles_are_left_out(trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert repeats([*range(50), *[1, 2, 3, 4, 5] * 20])
    assert not repeats([1, 2, 3, 4, 5] * 12)  # too short to tell
    assert not repeats([*[1, 2, 3, 4, 5] * 20, *range(100)])  # it found its way out
    sample(str(trained_folder), tmp_path / "some", CONFIG)
    monkeypatch.setattr(module, "repeats", lambda ids: len(ids) < 15)
    sample(str(trained_folder), tmp_path / "fewer", CONFIG)
    some, fewer = (json.loads((tmp_path / name / "sample.json").read_text())["counts"] for name in ("some", "fewer"))
    assert some["repeating"] == 0 < fewer["repeating"] and some["texts"] == fewer["texts"] + fewer["repeating"]
    monkeypatch.setattr(module, "repeats", lambda ids: True)
    with pytest.raises(UserError, match="raise --temperature"):
        sample(str(trained_folder), tmp_path / "out", CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"length": 129}, "--length is 129, but .* takes at most 128 tokens"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature_start": 0.0}, "temperature_start is 0.0"),
        ({"first_token": "best"}, "first_token 'best' is unknown"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
    ],
)
def test_mistakes(trained_folder: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    config = SampleConfig(**{**vars(CONFIG), **changes})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        sample(str(trained_folder), tmp_path / "out", config)
    assert not list(tmp_path.iterdir())


def test_unfit_models_and_places_are_refused(written: Path, trained_folder: Path, tmp_path: Path) -> None:
    sample(str(trained_folder), written, CONFIG)  # which is there
    with pytest.raises(UserError, match="exists already"):
        sample(str(trained_folder), written, SampleConfig(tokens=401, length=20))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    with pytest.raises(UserError, match="did not make"):
        sample(str(trained_folder), tmp_path / "mine", CONFIG, overwrite=True)
    bare = tmp_path / "bare"
    shutil.copytree(trained_folder, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(UserError, match="has no tokenizer"):
        sample(str(bare), tmp_path / "out", CONFIG)
    large = tmp_path / "large"
    shutil.copytree(trained_folder, large)
    weights = load_file(large / "model.safetensors")
    weights["model.norm.weight"] *= 1e38
    save_file(weights, large / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="logits of .* are no numbers"):
        sample(str(large), tmp_path / "out", CONFIG)
