"""Full disks and places that can only be read: every command that writes says so in one line, and leaves nothing."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import llmprune.cli  # noqa: F401  # all its commands
from data_prep.__main__ import app as prepare_app
from llmprune.cli.common import app
from llmprune.config.job_files import load_job, load_training_job
from llmprune.conversion.commands import convert
from llmprune.jobs.iterate import iterate
from llmprune.jobs.score import run_scoring
from llmprune.jobs.search import search
from llmprune.jobs.train import train
from llmprune.utils import outputs
from llmprune.utils.errors import one_line
from llmprune.utils.outputs import is_leftover


def mount(*arguments: str) -> bool:
    return (
        shutil.which("mount") is not None and not subprocess.run(["mount", *arguments], capture_output=True).returncode
    )


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A very small file system."""
    place = tmp_path_factory.mktemp("disk")
    if not mount("-t", "tmpfs", "-o", "size=16k", "tmpfs", str(place)):
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="module")
def things(model_folder: Path, data: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the commands read, by name."""
    folder = tmp_path_factory.mktemp("things")
    job = folder / "job.yaml"
    job.write_text(f"""
run: {{name: test, folder: {folder}/run, seed: 3}}
model: {{path: {model_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
train: {{duration: 2ba, global_batch_size: 4, microbatch_size: 4, eval_interval: 0ba}}
checkpoint: {{interval: 1ba}}
""")
    for name, section in (
        ("iterate", "job: iterate\niterate: {rounds: 1}\nplan: {shape: {layers: 3}, criterion: tail}"),
        (
            "search",
            "job: search\nsearch: {criteria: [tail], remove: [1], budget: {params: '0.9'}}\n"
            "layer_scoring: {data: {length: 32}}",
        ),
    ):
        (folder / f"{name}.yaml").write_text(f"{job.read_text()}{section}\n")
    (folder / "score.yaml").write_text(f"""
run: {{name: test, folder: {folder}/scored}}
model: {{path: {model_folder}}}
job: score
layer_scoring: {{criteria: [magnitude_l1], data: {{path: {data}}}}}
""")
    train(load_training_job(job))
    app(["score", str(model_folder), "--criteria", "tail", "--out", f"{folder}/scores.json"], standalone_mode=False)
    plan = ["plan", f"{folder}/scores.json", "--criterion", "tail", "--remove", "1", "--out", f"{folder}/plan.json"]
    app(plan, standalone_mode=False)
    (folder / "prompts.txt").write_text("one two three\n")
    (folder / "chats.jsonl").write_text('{"prompt": "one", "response": "two three four five six"}\n' * 30)
    shared = ["tokenize", str(corpus), "--tokenizer", f"{data}/tokenizer", "--sequence-length", "32"]
    prepare_app([*shared, "--shard", "0/1", "--out", f"{folder}/part"], standalone_mode=False)
    return {"F": str(folder), "MODEL": str(model_folder), "DATA": str(data), "CORPUS": str(corpus)}


COMMANDS = {
    "score": "score MODEL --criteria magnitude_l1 --out OUT.json",
    "plan": "plan F/scores.json --criterion tail --remove 1 --out OUT.json",
    "apply": "apply MODEL F/plan.json --out OUT",
    "convert": "convert F/run --out OUT",
    "enrich": "enrich MODEL --out OUT",
    "evaluate": "evaluate MODEL --perplexity CORPUS/numbers/part.jsonl --segment 16 --out OUT.json",
    "generate": "generate MODEL --prompts F/prompts.txt --max-new-tokens 2 --out OUT.jsonl",
    "references": "references MODEL --data DATA --samples-per-domain 1 --out OUT.json",
    "measure": "measure MODEL --output-tokens 2 --warmups 0 --repeats 1 --out OUT.json",
    "report": "report F/run --out OUT.html",
    "report with plots": "report F/run --out F/page.html --plots OUT --overwrite",
}
PREPARATION = {
    "tokenize": "tokenize CORPUS --tokenizer DATA/tokenizer --sequence-length 32 --out OUT",
    "conversations": "conversations F/chats.jsonl --tokenizer DATA/tokenizer --template none --out OUT",
    "merge": "merge F/part --out OUT",
    "tokenizer": "tokenizer CORPUS --vocab-size 300 --out OUT",
    "corpus": "corpus --megabytes 0.1 --out OUT",
    "teach": "teach DATA --teacher MODEL --out OUT",
    "sample": "sample MODEL --tokens 40 --length 20 --out OUT",
}
JOBS = ("train", "score job", "iterate", "search")
# What stays on a full disk: whole scores, runs to go on with, the progress of data preparation.
KEPT = {
    "score": {"out.json"},
    "teach": {".out.teach"},
    "sample": {".out.sample"},
    **{name: {".out.partial"} for name in ("tokenize", "conversations", "merge")},
    **{name: {"out"} for name in JOBS},
}
# What fits into the small file system: all that these write is a few hundred bytes.
SMALL = {"sample", "plan", "generate", "references", "evaluate", "measure"}


def carry_out(name: str, things: dict[str, str], out: Path) -> None:
    """Run a command that writes to ``out``."""
    if name in JOBS:
        yaml = f"{things['F']}/{ {'train': 'job', 'score job': 'score'}.get(name, name) }.yaml"
        where = [f"run.folder={out}"]
        kinds: dict[str, Any] = {"score job": run_scoring, "iterate": iterate, "search": search}
        train(load_training_job(yaml, where)) if name == "train" else kinds[name](load_job(yaml, where))
        return
    line = {**COMMANDS, **PREPARATION}[name]
    for key, value in {**things, "OUT": str(out)}.items():
        line = " ".join(word.replace(key, value, 1) if word.startswith(key) else word for word in line.split())
    (prepare_app if name in PREPARATION else app)(line.split(), standalone_mode=False)


def refused(name: str, things: dict[str, str], out: Path) -> str:
    """What a command is told when it can't write to ``out``."""
    with pytest.raises(Exception) as found:
        carry_out(name, things, out)
    outputs._PROCESS.close()  # as at the end of the command's process
    told = one_line(found.value)
    assert told is not None and "\n" not in told, repr(found.value)
    return told


@pytest.mark.parametrize("name", [*COMMANDS, *PREPARATION, *JOBS])
def test_a_full_disk(name: str, things: dict[str, str], disk: Path) -> None:
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while name in SMALL:
            file.write(b"x" * 4096)
    try:
        told = refused(name, things, disk / "out")
        assert any(word in told for word in ("full", "takes no more", "No space", "can't write")), told
        left = {path.name for path in disk.iterdir() if not is_leftover(path)} - {"filler"}
        assert left <= KEPT.get(name, set()), left
    finally:
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("name", [*COMMANDS, *PREPARATION, *JOBS])
def test_a_place_that_can_only_be_read(name: str, things: dict[str, str], disk: Path) -> None:
    assert mount("-o", "remount,ro", str(disk))
    try:
        told = refused(name, things, disk / "out")
        assert "read" in told.lower(), told
    finally:
        assert mount("-o", "remount,rw", str(disk))
    assert not list(disk.iterdir())


def test_the_same_commands_work_elsewhere(things: dict[str, str], tmp_path: Path) -> None:
    """So that what is refused above is refused for the disk's sake."""
    for name in (*COMMANDS, *PREPARATION):
        carry_out(name, things, tmp_path / name.replace(" ", "_"))
    assert json.loads((tmp_path / "score.json").read_text())["blocks"]["magnitude_l1"]
    convert(f"{things['F']}/run", tmp_path / "again")
