"""Run folders: nothing of a user's is lost, and one job at a time works in them."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmprune.checkpoints.checkpoint_folder import CheckpointFolder
from llmprune.checkpoints.run_folder import RunFolder
from llmprune.config.job_files import load_job, load_training_job
from llmprune.conversion.commands import convert
from llmprune.jobs.iterate import iterate
from llmprune.jobs.score import run_scoring
from llmprune.jobs.search import search
from llmprune.jobs.train import train
from llmprune.utils import locks
from llmprune.utils.errors import UserError
from llmprune.utils.outputs import LOCK, is_ours, mark, output_folder
from tests.utils.test_locks import HOLD

ROOT = Path(__file__).parents[2]


@pytest.fixture
def yaml(data: Path, model_folder: Path, tmp_path: Path) -> Path:
    return _job(tmp_path, data, model_folder)


def _job(folder: Path, data: Path, model_folder: Path) -> Path:
    path = folder / "job.yaml"
    path.write_text(f"""
run: {{name: test, folder: {folder}/run, seed: 3}}
model: {{path: {model_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
train: {{duration: 4ba, global_batch_size: 4, microbatch_size: 4, eval_interval: 0ba}}
checkpoint: {{interval: 2ba}}
loggers: {{console: false}}
""")
    return path


@pytest.fixture(scope="module")
def trained_run(data: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four batches with two checkpoints, to be copied."""
    folder = tmp_path_factory.mktemp("once")
    train(load_training_job(_job(folder, data, model_folder)))
    return folder / "run"


@pytest.fixture
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of that run where ``yaml`` has its folder."""
    return shutil.copytree(trained_run, tmp_path / "run", symlinks=True)


@pytest.fixture
def jobs(yaml: Path, data: Path, model_folder: Path, tmp_path: Path) -> dict[str, Callable[..., Any]]:
    """Every kind of job that has a folder: takes overrides."""
    scored = tmp_path / "score.yaml"
    scored.write_text(f"""
run: {{name: test, folder: {tmp_path}/run}}
model: {{path: {model_folder}}}
job: score
layer_scoring: {{criteria: [magnitude_l1], data: {{path: {data}}}}}
""")
    return {
        "train": lambda *more: train(load_training_job(yaml, more)),
        "score": lambda *more: run_scoring(load_job(scored, [one for one in more if "autoresume" not in one])),
        "iterate": lambda *more: iterate(
            load_job(_with(yaml, "iterate: {rounds: 1}\nplan: {shape: {layers: 3}, criterion: tail}"), more)
        ),
        "search": lambda *more: search(
            load_job(_with(yaml, "search: {criteria: [tail], remove: [1], budget: {params: '0.9'}}"), more)
        ),
    }


def _with(yaml: Path, section: str) -> Path:
    other = yaml.with_name(f"{section.partition(':')[0]}.yaml")
    name = section.partition(":")[0]
    other.write_text(f"{yaml.read_text()}job: {name}\n{section}\n")
    return other


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.name != LOCK
    }


@pytest.mark.parametrize("kind", ["train", "score", "iterate", "search"])
@pytest.mark.parametrize("flags", [[], ["run.overwrite=true"], ["run.autoresume=true"]], ids=["plain", "new", "on"])
def test_a_folder_that_is_no_run_stays(
    kind: str, flags: list[str], jobs: dict[str, Callable[..., Any]], tmp_path: Path
) -> None:
    """Somebody's project, with a config.yaml and a git repository of its own."""
    project = tmp_path / "run"
    for name, text in {"config.yaml": "run: {}", ".git/HEAD": "ref", "src/thesis.txt": "years of work"}.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    before = tree(project)
    with pytest.raises(UserError, match="llmprune did not make"):
        jobs[kind](*flags)
    assert tree(project) == before


@pytest.mark.parametrize("kind", ["train", "iterate", "search"])
def test_what_llmprune_made_and_is_no_such_job_stays(
    kind: str, jobs: dict[str, Callable[..., Any]], tmp_path: Path
) -> None:
    """A model, scores or the work of another job: resuming never begins anew over them."""
    with output_folder(tmp_path / "run") as folder:
        (folder / "model.safetensors").write_text("days of work")
    before = tree(tmp_path / "run")
    with pytest.raises(UserError, match="holds something that is no"):
        jobs[kind]("run.autoresume=true")
    assert tree(tmp_path / "run") == before


@pytest.mark.parametrize("flags", [["run.overwrite=true"], ["run.overwrite=true", "run.autoresume=true"]])
@pytest.mark.parametrize("kind", ["train", "score", "iterate", "search"])
def test_no_job_deletes_what_it_reads(
    kind: str, flags: list[str], jobs: dict[str, Callable[..., Any]], model_folder: Path, tmp_path: Path
) -> None:
    with output_folder(tmp_path / "run") as folder:
        shutil.copytree(model_folder, folder / "model")
    before = tree(tmp_path / "run")
    with pytest.raises(UserError, match="would delete the input|holds something that is no"):
        jobs[kind](*flags, f"model.path={tmp_path}/run/model")
    assert tree(tmp_path / "run") == before


def test_rounds_go_on_though_they_may_be_overwritten(jobs: dict[str, Callable[..., Any]], tmp_path: Path) -> None:
    jobs["iterate"]()
    before = (tmp_path / "run" / "round-1" / "scores.json").stat().st_mtime_ns
    jobs["iterate"]("run.overwrite=true", "run.autoresume=true")
    assert (tmp_path / "run" / "round-1" / "scores.json").stat().st_mtime_ns == before


def renew(folder: Path) -> None:
    """Records of checksums that a newer version wrote."""
    for path in (folder / "checkpoints").glob("*.sums-*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 2}))


def halve(folder: Path) -> None:
    """Files of which only the first half has been copied."""
    for path in (folder / "checkpoints").glob("ba*.pt"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def forget(folder: Path) -> None:
    """The same before any checksum has come."""
    halve(folder)
    for path in (folder / "checkpoints").glob("*.sums-*.json"):
        path.unlink()


@pytest.mark.parametrize("change", [renew, halve, forget])
def test_checkpoints_that_cannot_be_used_now_are_kept(change: Callable[[Path], None], yaml: Path, run: Path) -> None:
    change(run)
    before = tree(run)
    with pytest.raises(UserError, match=r"holds checkpoints, but ba4-rank0.pt can't be .*run.overwrite=true"):
        train(load_training_job(yaml, ["run.autoresume=true"]))
    assert tree(run) == before
    trainer = train(load_training_job(yaml, ["run.autoresume=true", "run.overwrite=true", "train.duration=2ba"]))
    assert trainer.state.timestamp.batch.value == 2


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_checkpoint_that_the_disk_does_not_give_is_kept(
    number: int, yaml: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if an older one could be read: the newer one may be there again in a moment."""
    CheckpointFolder(run / "checkpoints").note_writing(4)  # the kill came before its checksums, not before its end
    before = tree(run)
    opened = Path.open

    def failing(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "ba4-rank0.pt":
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        with pytest.raises(UserError, match=r"ba4-rank0.pt can't be read now .*" + os.strerror(number)):
            train(load_training_job(yaml, ["run.autoresume=true"]))
    assert tree(run) == before


def test_a_newer_checkpoint_that_is_damaged_is_set_aside(yaml: Path, run: Path) -> None:
    newest = run / "checkpoints" / "ba4-rank0.pt"
    damaged = newest.read_bytes()[:-100]
    newest.write_bytes(damaged)
    train(load_training_job(yaml, ["run.autoresume=true"]))
    assert (run / "checkpoints" / "unusable" / "ba4-rank0.pt").read_bytes() == damaged
    assert CheckpointFolder(run / "checkpoints").latest(contents=True) == newest


def test_a_checkpoint_that_a_kill_has_cut_off_hinders_nobody(yaml: Path, run: Path) -> None:
    """Its note says that it was being written: it was never complete."""
    folder = RunFolder(run).checkpoints
    for path in {*folder.glob("*.sums-*"), *folder.glob("ba2*")}:
        path.unlink()
    checkpoint = folder / "ba4-rank0.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    CheckpointFolder(folder).note_writing(4)
    train(load_training_job(yaml, ["run.autoresume=true", "train.duration=2ba"]))
    assert not list(folder.glob("*.writing"))


def test_a_checkpoint_that_is_being_read_stays_on_resume(yaml: Path, run: Path) -> None:
    (run / "checkpoints" / ".ba2.0123abcd.lock").touch()
    train(load_training_job(yaml, ["run.autoresume=true", "checkpoint.keep=1", "train.duration=5ba"]))
    assert {path.name for path in (run / "checkpoints").glob("ba*.pt")} == {"ba2-rank0.pt", "ba5-rank0.pt"}
    assert [*(run / "checkpoints").glob("ba2.sums-*")]


def test_the_one_before_stays_until_the_newest_is_vouched_for(run: Path) -> None:
    folder = CheckpointFolder(run / "checkpoints")
    folder.note_writing(4)
    folder.keep(1, folder.path / "ba4-rank0.pt")
    assert {path.name for path in folder.path.glob("ba*.pt")} == {"ba2-rank0.pt", "ba4-rank0.pt"}
    folder.keep(1, folder.path / "ba4-rank0.pt")
    assert {path.name for path in folder.path.glob("ba*.pt")} == {"ba4-rank0.pt"}


@contextmanager
def busy(folder: Path) -> Iterator[None]:
    """Another process works in a folder."""
    folder.mkdir(exist_ok=True)
    mark(folder)
    code = HOLD.format(renewal=0.2, lease=60)
    command = [sys.executable, "-c", code, os.uname().nodename, str(folder / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["train", "score", "iterate", "search"])
def test_a_second_job_in_a_folder_is_refused(
    kind: str, jobs: dict[str, Callable[..., Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "RENEWAL", 0.2)
    with busy(tmp_path / "run"):
        for flags in ([], ["run.autoresume=true"], ["run.overwrite=true"]):
            with pytest.raises(UserError, match=f"is writing {tmp_path}/run: wait until it ends"):
                jobs[kind](*flags)


def test_a_model_in_the_run_that_is_overwritten_is_kept(yaml: Path, run: Path, model_folder: Path) -> None:
    shutil.copytree(model_folder, run / "model")
    with pytest.raises(UserError, match="would delete the input"):
        train(load_training_job(yaml, ["run.overwrite=true", f"model.path={run}/model"]))
    assert is_ours(run) and (run / "model" / "config.json").is_file()


def test_conversion_beside_a_run_that_deletes_its_checkpoints(yaml: Path, tmp_path: Path) -> None:
    """One is kept and one is written after every batch: a checkpoint that is being read stays."""
    failed: list[Exception] = []
    done = threading.Event()
    converted = 0

    def convert_often() -> None:
        nonlocal converted
        while not done.is_set() and not failed:
            if not converted and CheckpointFolder(tmp_path / "run" / "checkpoints").latest() is None:
                continue
            try:
                convert(tmp_path / "run", tmp_path / "out", overwrite=True)
                converted += 1
            except Exception as error:
                failed.append(error)

    reader = threading.Thread(target=convert_often)
    reader.start()
    try:
        train(load_training_job(yaml, ["train.duration=40ba", "checkpoint={interval: 1ba, keep: 1}"]))
    finally:
        done.set()
        reader.join()
    assert not failed and converted > 3
    assert sorted(path.name for path in tmp_path.iterdir() if ".out." in path.name) == []


def test_a_sharded_run_with_a_progress_bar_goes_on(yaml: Path, tmp_path: Path) -> None:
    """Composer's own bar has a state, which a sharded checkpoint would have to hold before there is a bar."""
    train(load_training_job(yaml, ["sharding={}", "train.duration=2ba"]))
    trainer = train(load_training_job(yaml, ["sharding={}", "run.autoresume=true"]))
    assert trainer.state.timestamp.batch.value == 4
