"""Five kills at seeded points: runs go on with the same samples, and nothing is left behind.

``tests/harness/kill_campaign.py`` does the same at any number of points.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from llmprune.checkpoints.checkpoint_folder import CheckpointFolder
from llmprune.checkpoints.run_folder import RunFolder
from llmprune.config.job_files import load_training_job
from llmprune.data.dataset import MixedDataset
from llmprune.data.prepared import PreparedData
from llmprune.jobs.train import train
from llmprune.utils.outputs import remove
from tests.harness import kill_campaign as campaign
from tests.harness import recorded_run

ROOT = Path(__file__).parents[2]
BATCH, BATCHES, DELAY = 8, 24, 6
CHANGES = {2: [800_000, 200_000], 5: [100_000, 900_000], 11: [500_000, 500_000]}


class Stream:
    """Batches from loader workers, with weights that change, from the beginning or from a state on."""

    def __init__(self, data: Path, workers: int, start: int = 0, state: dict[str, Any] | None = None) -> None:
        weights = {"numbers": 0.6, "letters": 0.4}
        self.dataset = MixedDataset(PreparedData(data), global_batch_size=BATCH, weights=weights, seed=3)
        if state is not None:
            self.dataset.load_state_dict(state)
        self.next, self._loader = start, iter(DataLoader(self.dataset, batch_size=BATCH, num_workers=workers))

    def take(self, until: int) -> list[list[list[int]]]:
        batches = []
        for number in range(self.next, until):
            if number in CHANGES:
                self.dataset.change_weights(CHANGES[number], number + DELAY)
            batches.append(next(self._loader)["input_ids"].tolist())
            self.next = number + 1
        return batches


def kill_and_wait(worker: psutil.Process) -> None:
    """The error comes by itself, whatever the process is at."""
    worker.kill()
    time.sleep(1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_killed_worker_ends_the_stream_which_goes_on_the_same(data: Path, seed: int) -> None:
    chance = random.Random(seed)
    whole = Stream(data, workers=0).take(BATCHES)
    children, shared_memory = set(psutil.Process().children(recursive=True)), campaign.shared_memory()

    first = Stream(data, workers=2)
    batches = first.take(chance.randrange(1, BATCHES - DELAY))
    state = first.dataset.state_dict(first.next * BATCH, True)
    killed = first.next
    time.sleep(chance.uniform(0, 0.02))
    workers = sorted(set(psutil.Process().children()) - children, key=lambda process: process.pid)
    assert len(workers) == 2
    victim = chance.choice(workers)
    with pytest.raises(RuntimeError, match=rf"DataLoader worker \(pid {victim.pid}\) is killed by signal: Killed"):
        kill_and_wait(victim)
    del first

    rest = Stream(data, chance.choice((0, 1, 2)), killed, state)
    assert batches + rest.take(BATCHES) == whole
    del rest
    psutil.wait_procs(set(psutil.Process().children()) - children, timeout=10)
    assert set(psutil.Process().children(recursive=True)) == children
    assert campaign.shared_memory() <= shared_memory


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[str]], float]:
    """The campaign's YAML, and the samples and the loss of an undisturbed run on one rank."""
    out = tmp_path_factory.mktemp("kills")
    yaml = campaign.prepare(out)
    run = campaign.Run(out / "undisturbed", yaml)
    resume_here(run, yaml)
    samples = run.samples()
    assert [*samples] == [*range(campaign.BATCHES)] and all(len(set(batch)) == BATCH for batch in samples.values())
    return yaml, samples, run.loss()


def resume_here(run: Any, yaml: Path) -> None:
    """Begin a run, or go on with it, on one rank in this process."""
    settings = [f"run.folder={run.folder}/run", "run.autoresume=true", "data.workers=0"]
    train(load_training_job(yaml, settings), [recorded_run.recorder()(str(run.folder / "attempt-9"))])  # type: ignore[call-arg]


@pytest.mark.parametrize(("victim", "event"), [("rank", "checkpoint"), ("launcher", "batch")])
def test_a_killed_run_takes_all_its_processes_along_and_goes_on_the_same(
    prepared: tuple[Path, dict[int, list[str]], float], victim: str, event: str, tmp_path: Path
) -> None:
    yaml, samples, loss = prepared
    chance = random.Random(victim)
    run = campaign.Run(tmp_path, yaml)
    strike = campaign.Strike(victim, event, chance.randrange(campaign.LAST_STRIKE), chance.uniform(0, 0.05))
    aftermath = run.strike(strike, chance)
    assert aftermath.clean, aftermath
    resume_here(run, yaml)
    assert run.samples() == samples
    assert run.loss() == pytest.approx(loss, rel=1e-5)


def test_a_rank_ends_with_its_launcher_from_the_start() -> None:
    """The rank takes seconds to import what it needs and five more to let rank 0 tell the mistake."""
    launch = "import subprocess, sys; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); input()"
    rank = [sys.executable, str(ROOT / "train.py"), "missing.yaml"]
    launcher = subprocess.Popen(
        [sys.executable, "-c", launch, *rank],
        env={**os.environ, "RANK": "1", "LOCAL_RANK": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert launcher.stdout is not None
    process = psutil.Process(int(launcher.stdout.readline()))
    time.sleep(1)
    launcher.kill()
    launcher.wait()
    try:
        process.wait(3)
    finally:
        if process.is_running():
            process.kill()


def test_a_kill_between_two_links_loses_no_checkpoint(tmp_path: Path) -> None:
    """Composer removes ``latest-rank0.pt`` before it makes it anew."""
    run = RunFolder(tmp_path)
    assert run.latest_checkpoint() is None
    run.checkpoints.mkdir()
    whole, cut = (run.checkpoints / f"ba{batch}-rank0.pt" for batch in (10, 100))
    torch.save({"weights": torch.zeros(1000)}, whole)
    cut.write_bytes(whole.read_bytes()[:-100])
    (run.checkpoints / "model").mkdir()
    (run.checkpoints / "ba20").mkdir()
    assert run.latest_checkpoint() == whole
    (run.checkpoints / "ba20" / ".metadata").touch()
    assert run.latest_checkpoint() == run.checkpoints / "ba20"


def test_resumes_do_not_pile_up_checkpoints(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create()
    for batch in (9, 10, 100):
        (run.checkpoints / f"ba{batch}").mkdir()
        (run.checkpoints / f"ba{batch}" / ".metadata").touch()
    torch.save([1.0] * 100, run.checkpoints / "ba7-rank0.pt")
    (run.checkpoints / "ba200-rank0.pt").write_bytes(b"cut short")
    CheckpointFolder(run.checkpoints).note_writing(200)
    for keep, left in ((-1, {"ba7-rank0.pt", "ba9", "ba10", "ba100"}), (2, {"ba10", "ba100"}), (1, {"ba100"})):
        CheckpointFolder(run.checkpoints).keep(keep)
        assert {path.name for path in run.checkpoints.iterdir()} == left


def test_a_run_half_deleted_is_still_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "run")
    run.create()
    (run.path / "metrics.jsonl").touch()
    (run.path / "more").mkdir()

    def killed(path: Path) -> None:
        remove(path)
        raise KeyboardInterrupt

    monkeypatch.setattr("llmprune.utils.outputs.remove", killed)
    with pytest.raises(KeyboardInterrupt):
        run.create()
    monkeypatch.undo()
    assert run.find(overwrite=True, autoresume=False) is None
    run.create()
    assert {path.name for path in run.path.iterdir()} == {".llmprune", "checkpoints"}
