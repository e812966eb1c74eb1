"""Checkpoints are vouched for, copied, thinned out, and found again where nothing else is left."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch

from llmprune.callbacks.checkpoint_uploading import CheckpointUploading
from llmprune.checkpoints.run_folder import RunFolder
from llmprune.config.job_files import load_training_job
from llmprune.conversion.checkpoint import Checkpoint
from llmprune.conversion.commands import convert
from llmprune.jobs.stages import recovery_of
from llmprune.jobs.train import train
from llmprune.reporting.page import write_report
from llmprune.utils import object_store as stores
from llmprune.utils.checksums import VERIFICATION, Verification
from llmprune.utils.errors import UserError
from llmprune.utils.files import inside
from llmprune.utils.object_store import open_store
from tests.callbacks import plain_runs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(data: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("safe") / "run.yaml"
    path.write_text(f"""
run: {{name: test, folder: nowhere, seed: 3}}
model: {{path: {model_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
dynamic_loading: {{references: {{letters: 1.0, numbers: 3.0}}, update_delay: 2}}
optimizer: {{lr: 1.0e-3}}
train: {{duration: 8ba, global_batch_size: 4, microbatch_size: 4, eval_interval: 3ba, check_memory: false}}
checkpoint: {{interval: 2ba}}
loggers: {{console: false}}
""")
    return path


@pytest.fixture
def verification() -> Iterator[Verification]:
    yield VERIFICATION
    VERIFICATION.asked = False
    VERIFICATION._seen.clear()


def run(config: Path, folder: Path, *more: str) -> Checkpoint:
    train(load_training_job(config, [f"run.folder={folder}", *more]))
    return Checkpoint.open(folder)


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").glob("ba*")}


def same(a: Checkpoint, b: Checkpoint) -> bool:
    return set(a.state) == set(b.state) and all(torch.equal(a.state[name], b.state[name]) for name in a.state)


@pytest.fixture(params=["bucket", "folder"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "elsewhere")
    endpoint = request.getfixturevalue("s3")
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="runs")
    return "s3://runs/some/run"


def test_as_many_stay_as_asked_for_each_with_its_checksums(config: Path, tmp_path: Path) -> None:
    run(config, tmp_path / "run")
    assert names(tmp_path / "run") == {"ba6-rank0.pt", "ba6.sums-0.json", "ba8-rank0.pt", "ba8.sums-0.json"}
    record = json.loads((tmp_path / "run/checkpoints/ba8.sums-0.json").read_text())
    size = (tmp_path / "run/checkpoints/ba8-rank0.pt").stat().st_size
    assert record["ranks"] == 1 and record["files"]["ba8-rank0.pt"]["bytes"] == size
    shutil.rmtree(tmp_path / "run")
    run(config, tmp_path / "run", "checkpoint.keep=-1")
    assert len(names(tmp_path / "run")) == 8


def test_a_new_machine_goes_on_from_the_store(config: Path, remote: str, tmp_path: Path) -> None:
    once = run(config, tmp_path / "once")
    first = [f"checkpoint.remote={remote}", "run.autoresume=true"]
    plain_runs.run(config, f"run.folder={tmp_path}/run", *first, kill=5)
    there = open_store(remote).names("")
    assert {"config.yaml", "metrics.jsonl", "checkpoints/manifest.json", "checkpoints/model/config.json"} <= {*there}
    assert {n for n in there if n.startswith("checkpoints/ba")} == {
        f"checkpoints/ba{batch}{end}" for batch in (2, 4) for end in ("-rank0.pt", ".sums-0.json")
    }
    shutil.rmtree(tmp_path / "run")  # the machine is gone
    again = run(config, tmp_path / "run", *first)
    assert same(once, again) and again.batch == 8
    assert (tmp_path / "run/metrics.jsonl").read_text().count("loss/train/total") == 8
    write_report([tmp_path / "run"], tmp_path / "report.html")
    convert(tmp_path / "run", tmp_path / "model")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 30 and not any(b"very-secret" in path.read_bytes() for path in written)
    with pytest.raises(UserError, match="holds a run's checkpoints already: pass run.autoresume=true"):
        run(config, tmp_path / "other", f"checkpoint.remote={remote}")


def test_what_came_incomplete_or_damaged_to_the_store_is_passed_over(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote, first = tmp_path / "elsewhere", [f"checkpoint.remote={tmp_path}/elsewhere", "run.autoresume=true"]
    run(config, tmp_path / "run", *first)
    (remote / "checkpoints/ba8.sums-0.json").unlink()  # killed before
    damaged = remote / "checkpoints/ba6-rank0.pt"
    flip(damaged)
    fetched = RunFolder(tmp_path / "fetched")
    fetched.fetch(open_store(str(remote)))
    assert fetched.latest_checkpoint(contents=True).name == "ba4-rank0.pt"  # type: ignore[union-attr]
    assert "checkpoint after batch 6" in caplog.text and "is damaged (its sha256" in caplog.text
    for name in ("ba4.sums-0.json", "ba2.sums-0.json"):
        record = remote / "checkpoints" / name
        record.write_text(record.read_text().replace('"ba', '"../ba'))
    with pytest.raises(UserError, match="is no name of a file in"):
        RunFolder(tmp_path / "third").fetch(open_store(str(remote)))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_store_that_fails_and_comes_back(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stores, "WAIT", 0.001)
    copy, fails = shutil.copyfile, True

    def failing(source: Any, target: Any) -> Any:
        if fails and "elsewhere" in str(target):
            raise OSError("no route to host")
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", failing)
    settings = [f"checkpoint.remote={tmp_path}/elsewhere", "run.autoresume=true"]
    with pytest.raises(
        UserError, match=r"no route to host; the newest checkpoint is in .* alone: run the same job with"
    ):
        run(config, tmp_path / "run", *settings)
    assert caplog.text.count("the run continues, and its next checkpoint is tried again") == 4
    fails = False
    run(config, tmp_path / "run", *settings)
    there = {path.name for path in (tmp_path / "elsewhere/checkpoints").glob("ba*")}
    assert there == {"ba8-rank0.pt", "ba8.sums-0.json"}


def test_a_damaged_checkpoint_is_passed_over_on_resume(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    once = run(config, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=True)
    for damage, reason in (
        (flip, "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not written to its end"),
    ):
        damage(tmp_path / "copy/checkpoints/ba8-rank0.pt")
        caplog.clear()
        again = run(config, tmp_path / "copy", "run.autoresume=true")
        assert same(once, again) and reason in caplog.text and "ba8-rank0.pt is passed over" in caplog.text


def test_checkpoints_are_verified_when_asked(config: Path, tmp_path: Path, verification: Verification) -> None:
    run(config, tmp_path / "run")
    verification.asked = True
    flip(tmp_path / "run/checkpoints/ba8-rank0.pt")
    assert Checkpoint.open(tmp_path / "run").batch == 6
    with pytest.raises(UserError, match="ba8-rank0.pt is damaged"):
        Checkpoint.open(tmp_path / "run/checkpoints/ba8-rank0.pt")
    verification.asked = False
    assert Checkpoint.open(tmp_path / "run").batch == 8


def test_two_ranks_vouch_for_their_own_parts(config: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "composer"), "-n", "2", "train.py", str(config)]
    settings = [f"run.folder={tmp_path}/run", f"checkpoint.remote={tmp_path}/elsewhere", "sharding={}"]
    done = subprocess.run([*command, *settings], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    once = Checkpoint.open(tmp_path / "run")
    assert names(tmp_path / "run") == {
        "ba6",
        "ba6.sums-0.json",
        "ba6.sums-1.json",
        "ba8",
        "ba8.sums-0.json",
        "ba8.sums-1.json",
    }
    shared = open_store(f"{tmp_path}/elsewhere")
    assert sum(name.endswith(".distcp") for name in shared.names("checkpoints/ba")) == 8
    (tmp_path / "elsewhere/checkpoints/ba8.sums-1.json").unlink()  # rank 1 was killed while it copied
    again = run(config, tmp_path / "again", *settings[1:], "run.autoresume=true")  # on one rank
    assert again.batch == 8
    for name in once.state:
        torch.testing.assert_close(again.state[name], once.state[name], rtol=1e-4, atol=1e-5)


def test_what_is_still_being_written_does_not_count(tmp_path: Path) -> None:
    top = tmp_path / "checkpoints"
    top.mkdir()
    torch.save({"a": 1}, top / "ba100-rank0.pt")
    (top / "ba150-rank0.pt").write_bytes(b"the first bytes")
    safe = CheckpointUploading(tmp_path, keep=1)
    safe.finish(100)
    assert {path.name for path in top.iterdir()} == {"ba100-rank0.pt", "ba100.sums-0.json", "ba150-rank0.pt"}
    torch.save({"a": 1}, top / "ba150-rank0.pt")
    safe.finish(150)
    assert {path.name for path in top.iterdir()} == {"ba150-rank0.pt", "ba150.sums-0.json"}


def test_a_checkpoint_that_nobody_vouched_for_is_seen_to_on_resume(config: Path, tmp_path: Path) -> None:
    remote = f"checkpoint.remote={tmp_path}/elsewhere"
    run(config, tmp_path / "run", remote)
    for folder in (tmp_path / "run", tmp_path / "elsewhere"):
        (folder / "checkpoints/ba8.sums-0.json").unlink()
    run(config, tmp_path / "run", remote, "run.autoresume=true")  # it is complete
    assert (tmp_path / "elsewhere/checkpoints/ba8.sums-0.json").is_file()


def test_a_machine_of_its_own_takes_what_all_can_have(config: Path, tmp_path: Path) -> None:
    run(config, tmp_path / "run", f"checkpoint.remote={tmp_path}/elsewhere")
    (tmp_path / "elsewhere/checkpoints/ba8.sums-0.json").unlink()  # another machine had not brought its part
    folder, store = RunFolder(tmp_path / "run"), open_store(f"{tmp_path}/elsewhere")
    folder.fetch(store)
    assert folder.latest_checkpoint().name == "ba8-rank0.pt"  # type: ignore[union-attr]
    folder.fetch(store, shared=False)
    assert folder.latest_checkpoint().name == "ba6-rank0.pt"  # type: ignore[union-attr]
    assert (tmp_path / "run/checkpoints/unusable/ba8-rank0.pt").is_file()
    for path in (tmp_path / "elsewhere/checkpoints").glob("ba*"):
        path.unlink()
    with pytest.raises(UserError, match=r"has no checkpoint, and .*ba6-rank0.pt is only on this machine"):
        folder.fetch(store, shared=False)
    assert folder.latest_checkpoint().name == "ba6-rank0.pt"  # type: ignore[union-attr]


def test_the_good_copy_takes_the_place_of_a_damaged_checkpoint(config: Path, tmp_path: Path) -> None:
    once = run(config, tmp_path / "run", f"checkpoint.remote={tmp_path}/elsewhere")
    flip(tmp_path / "run/checkpoints/ba8-rank0.pt")
    RunFolder(tmp_path / "run").fetch(open_store(f"{tmp_path}/elsewhere"))
    found = RunFolder(tmp_path / "run").latest_checkpoint(contents=True)
    assert found is not None and found.name == "ba8-rank0.pt" and same(once, Checkpoint.open(tmp_path / "run"))


def test_mistakes(config: Path, tmp_path: Path) -> None:
    run(config, tmp_path / "run", f"checkpoint.remote={tmp_path}/elsewhere")
    run(config, tmp_path / "other", "run.seed=4", "checkpoint.keep=1")
    settings = ["run.seed=4", f"checkpoint.remote={tmp_path}/elsewhere", "run.autoresume=true"]
    with pytest.raises(UserError, match="elsewhere holds checkpoints of another run than"):
        run(config, tmp_path / "other", *settings)
    with pytest.raises(UserError, match="must not be inside each other"):
        run(config, tmp_path / "third", f"checkpoint.remote={tmp_path}/third/copies")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file: choose another folder"):
        run(config, tmp_path / "file", *settings)
    with pytest.raises(UserError, match="nothing://x can't be used"):
        open_store("nothing://x")
    for name in ("//tmp/x", "/tmp/x", "../x", "a/../../x", "", None, "a\0"):
        with pytest.raises(UserError, match="is no name of a file"):
            inside(tmp_path, name)


def test_every_recovery_of_a_job_has_its_own_place_in_the_store(config: Path, tmp_path: Path) -> None:
    job = load_training_job(config, [f"run.folder={tmp_path}/job", "checkpoint.remote=s3://runs/job"])
    recovery = recovery_of(job, tmp_path / "job" / "round-2", name="x", seed=1)
    assert recovery.checkpoint.remote == "s3://runs/job/round-2"
    assert recovery.run.folder == f"{tmp_path}/job/round-2/recover"
