"""A few seeded faults; ``tests/harness/fault_campaign.py`` does any number of them to every kind of job."""

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmprune.config.job_files import load_job
from llmprune.conversion.commands import apply
from llmprune.jobs.train import train
from llmprune.utils.errors import UserError, disk_error
from tests.harness import fault_campaign
from tests.harness.faults.cases import CASES, Bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:  # what the processes that are started inherit
        patch.setenv("PYTHONPATH", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Bench(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("job", ["prune", "distil", "replace", "export", "shards"])
def test_a_killed_job_ends_as_the_undisturbed_one(bench: Bench, job: str) -> None:
    line = fault_campaign.carry_out(bench, "SIGKILL", job, 0, seed=1)
    assert line["lost"] is None


@pytest.mark.parametrize(
    ("fault", "job"),
    [
        ("file cut off by a limit", "prune"),
        ("file cut off by a limit", "export"),
        ("damaged checkpoint", "prune"),
        ("damaged model or shard", "export"),
        ("damaged model or shard", "shards"),
        ("damaged data", "prune"),
        ("NaN", "prune"),
        ("jumping clock", "prune"),
        ("failing remote", "prune"),
    ],
)
def test_a_fault_is_told_and_nothing_is_lost(bench: Bench, fault: str, job: str) -> None:
    assert fault_campaign.carry_out(bench, fault, job, 0, seed=1)["lost"] is None


def test_what_is_lost_is_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that changes what comes out, and one that ends without a clear line."""

    def other(bench: Bench, job: str, folder: Path, chance: random.Random) -> str | None:
        return bench.same(job, folder, "run.seed=4")

    def crash(bench: Bench, job: str, folder: Path, chance: random.Random) -> str | None:
        return bench.same("prune", folder, "model.path=null", "model.config={model_type: llama, hidden_size: 7}")

    monkeypatch.setitem(CASES, "other", (other, ["prune"]))
    monkeypatch.setitem(CASES, "crash", (crash, ["prune"]))
    lines = [fault_campaign.carry_out(bench, fault, "prune", 0, seed=1) for fault in ("other", "crash")]
    assert lines[0]["lost"] == "what comes out is another" and lines[1]["lost"].startswith("going on ended with 2: ")
    assert "| other | 0/1 |" in fault_campaign.table(lines).replace("|  ", "")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "x.pt"), r"the disk is full \(x.pt\): what was complete before stays"),
        (RuntimeError("[enforce fail at inline_container.cc:626] unexpected pos 64 vs 0"), "the disk is full or takes"),
        (RuntimeError("unable to resize file </torch_1_2_0> to the right size"), r"shared memory \(/dev/shm\) is full"),
    ],
)
def test_a_disk_that_takes_no_more_is_named(error: Exception, words: str) -> None:
    told = disk_error(error)
    assert told is not None and re.match(words, told)
    outer = ValueError("while saving")
    outer.__cause__ = error
    assert disk_error(outer) is not None and disk_error(ValueError("another")) is None


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="a place that nobody can write to")
def test_a_read_only_place_is_named_at_once(bench: Bench, tmp_path: Path) -> None:
    job: Any = load_job(bench.inputs / "job.yaml", ["run.folder=/sys/llmprune-run"])
    with pytest.raises(UserError, match="can't write to /sys/llmprune-run"):
        train(job)
    plan = tmp_path / "plan.json"
    fault_campaign.carry_out(bench, "SIGKILL", "export", 7, seed=1)
    whole = bench.out / "undisturbed-export" / "model" / "llmprune" / "plan.json"
    plan.write_text(whole.read_text())
    with pytest.raises(UserError, match="can't write /sys/.llmprune-out.lock: "):
        apply(bench.inputs / "model", plan, "/sys/llmprune-out")
