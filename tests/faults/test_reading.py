"""Files that are none, or that would take all memory, where a plan, a job or another small file belongs."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llmprune.checkpoints.metrics import read_metrics
from llmprune.checkpoints.run_folder import Manifest
from llmprune.config.job_files import load_job, load_recorded
from llmprune.config.yaml_files import BYTES
from llmprune.data.format import DataManifest
from llmprune.data.weight_updates import read_references
from llmprune.evaluation.continuations import read_continuations, read_prompts
from llmprune.evaluation.stability import read_answers
from llmprune.models.loading import load_model_config
from llmprune.plans.plan import Plan
from llmprune.pruning.scoring.scores import Scores
from llmprune.utils.checksums import read_record
from llmprune.utils.errors import UserError
from llmprune.utils.files import JSON_LIMIT, parse_json, read_json

# what reads a file, and that file's name in the folder that it is given
READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "plan": (lambda folder: Plan.load(folder / "x.json"), "x.json"),
    "scores": (lambda folder: Scores.load(folder / "x.json"), "x.json"),
    "manifest of data": (DataManifest.load, "manifest.json"),
    "manifest of a run": (Manifest.load, "manifest.json"),
    "record": (lambda folder: read_record(folder / "x.json"), "x.json"),
    "references": (lambda folder: read_references(str(folder / "x.json")), "x.json"),
    "config of a model": (load_model_config, "config.json"),
    "answers": (lambda folder: read_answers(folder / "samples_x.jsonl"), "samples_x.jsonl"),
    "predictions": (lambda folder: read_answers(folder / "x.json"), "x.json"),
    "prompts": (lambda folder: read_prompts(folder / "x.jsonl"), "x.jsonl"),
    "continuations": (lambda folder: read_continuations(folder / "x.jsonl"), "x.jsonl"),
    "job": (lambda folder: load_job(folder / "x.yaml"), "x.yaml"),
    "config of a run": (lambda folder: load_recorded(folder / "x.yaml"), "x.yaml"),
}
CONTENTS = {
    "nested": "[" * 200_000 + "]" * 200_000,
    "nested fields": '{"a":' * 200_000 + "1" + "}" * 200_000,
    "digits": '{"schema": ' + "9" * 6000 + "}",
    "fewer digits": '{"schema": ' + "9" * 400 + "}",
    "NUL": '{"schema": "\0"',
    "a list": "[1]",
    "empty": "",
    "not UTF-8": "\udcff",
}


@pytest.mark.parametrize("kind", READERS)
def test_no_such_file_is_read(kind: str, tmp_path: Path) -> None:
    read, name = READERS[kind]
    for what in ("device", "pipe", "folder", "loop", "huge", *CONTENTS):
        if (kind, what) == ("continuations", "empty"):
            continue  # none were written
        folder = tmp_path / what
        folder.mkdir()
        path = folder / name
        if what == "device":
            path.symlink_to("/dev/zero")
        elif what == "pipe":
            os.mkfifo(path)
        elif what == "folder":
            path.mkdir()
        elif what == "loop":
            path.symlink_to(name)
        elif what == "huge":
            with path.open("wb") as file:
                file.truncate(10**12)
        else:
            path.write_text(CONTENTS[what], errors="surrogateescape")
        with pytest.raises(UserError) as refused:
            read(folder)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000, (kind, what)


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", '{"a": -Infinity}', "1e999", "-1e999", "9" * 301])
def test_what_is_no_number_is_no_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="x.json is not valid JSON"):
        read_json(tmp_path / "x.json")


def test_what_other_programs_write_is_read() -> None:
    assert parse_json('{"a": [1, 2.5, -Infinity]}', finite=False) == {"a": [1, 2.5, -float("inf")]}
    assert parse_json('[1e308, 123456789012345678901234567890123456789012345678901234567890, "é"]'.encode())[0] == 1e308


def test_limits_hold_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (JSON_LIMIT, BYTES) == (2**29, 2**22)
    monkeypatch.setattr("llmprune.utils.files.JSON_LIMIT", 10)
    (tmp_path / "x.json").write_text('"12345678"')
    assert read_json(tmp_path / "x.json") == "12345678"
    (tmp_path / "x.json").write_text('"123456789"')
    with pytest.raises(UserError, match="more than 10 bytes"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "line", ["[1]", "{}", '{"batch": "1"}', '{"batch": 1, "loss": "x"}', "[" * 200_000, '{"batch": 1, "a']
)
def test_damaged_metrics_are_named(line: str, tmp_path: Path) -> None:
    good = '{"batch": 1, "loss": NaN}\n'
    (tmp_path / "m.jsonl").write_text(good + line)
    assert [found["batch"] for found in read_metrics(tmp_path / "m.jsonl")] == [1]  # torn by a crash
    (tmp_path / "m.jsonl").write_text(good + line + "\n" + good)
    with pytest.raises(UserError, match="m.jsonl:2 is no line of metrics"):
        read_metrics(tmp_path / "m.jsonl")
