"""A run that is asked to end saves, leaves, and goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger

from llmprune.config.job_files import load_training_job
from llmprune.conversion.checkpoint import Checkpoint
from llmprune.jobs.train import train
from llmprune.utils.processes import TERMINATION, Preempted

ROOT = Path(__file__).parents[2]
BATCHES, ASKED = 10, 4
KINDS = {
    "continue": "dynamic_loading={references: {letters: 1.0, numbers: 3.0}, update_delay: 2}",
    "prune": "l0_pruning={target: {layers: 5, hidden: 24, heads: 4}, lagrangian_warmup: 4ba, gate_lr: 0.05}",
    "replace": "block_replacement={start: 2, length: 2, kind: swiglu, intermediate: 16}",
    "parts": "trainable={parameters: [final_norm, last.1], later: {3ba: [norms], 6ba: [all]}}",
    "lora": "lora={dropout: 0.3}",
    "distil": "distillation={teacher: TEACHER, objectives: {kl: 1.0}, final_objectives: {lm: 1.0}, dtype: float32}",
}


class Asking(Callback):
    """Somebody sends SIGTERM in the middle of a batch."""

    def after_train_batch(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == ASKED:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def listening() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    TERMINATION.listen()
    yield
    TERMINATION.asked = False
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def config(data: Path, trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preempted") / "run.yaml"
    path.write_text(f"""
run: {{name: test, folder: nowhere, seed: 3}}
model: {{path: {trained_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
optimizer: {{lr: 1.0e-3}}
scheduler: {{warmup: 3ba}}
train: {{duration: {BATCHES}ba, global_batch_size: 8, microbatch_size: 4, eval_interval: 3ba}}
checkpoint: {{interval: {BATCHES}ba}}
loggers: {{console: false}}
""")
    return path


def losses(run: Path) -> list[tuple[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(name, line[name]) for line in lines for name in ("loss/train/total", "metrics/eval/loss") if name in line]


@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_as_the_undisturbed_run(
    config: Path, trained_folder: Path, tmp_path: Path, listening: None, kind: str
) -> None:
    changes = KINDS[kind].replace("TEACHER", str(trained_folder))
    train(load_training_job(config, [f"run.folder={tmp_path}/once", changes]))
    settings = [f"run.folder={tmp_path}/asked", "run.autoresume=true", changes]
    with pytest.raises(Preempted, match=f"saved after batch {ASKED + 1}; run.autoresume=true resumes it"):
        train(load_training_job(config, settings), [Asking()])
    assert Checkpoint.open(tmp_path / "asked").path.name == f"ba{ASKED + 1}-rank0.pt"
    TERMINATION.asked = False
    train(load_training_job(config, settings))
    assert losses(tmp_path / "asked") == losses(tmp_path / "once")
    once, asked = (Checkpoint.open(tmp_path / name) for name in ("once", "asked"))
    assert set(once.state) == set(asked.state) and once.path.name == asked.path.name == f"ba{BATCHES}-rank0.pt"
    assert all(torch.equal(once.state[name], asked.state[name]) for name in once.state)


def test_asked_before_the_first_batch(config: Path, tmp_path: Path, listening: None) -> None:
    TERMINATION.asked = True
    with pytest.raises(Preempted, match="after batch 1"):
        train(load_training_job(config, [f"run.folder={tmp_path}/run"]))


@pytest.mark.parametrize("sharding", ["", "sharding={}"])
def test_two_ranks_with_workers(config: Path, tmp_path: Path, sharding: str) -> None:
    """All processes are asked at once, as a cluster does it: launcher, ranks and loader workers."""
    command = [str(Path(sys.executable).parent / "composer"), "-n", "2", "train.py", str(config)]
    common = ["data.workers=1", "train.duration=400ba", "checkpoint.interval=400ba", "train.eval_interval=0ba"]
    settings = [f"run.folder={tmp_path}/run", "run.autoresume=true", *common, *filter(None, [sharding])]
    with subprocess.Popen(
        [*command, *settings], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    ) as running:
        metrics = tmp_path / "run" / "metrics.jsonl"
        until = time.monotonic() + 120
        while time.monotonic() < until and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.1)
        processes = psutil.Process(running.pid).children(recursive=True)
        assert len(processes) >= 4  # ranks and workers
        os.killpg(running.pid, signal.SIGTERM)
        psutil.wait_procs(processes, timeout=60)
        printed = running.communicate(timeout=60)[0]
    assert running.returncode == 75 and not any(process.is_running() for process in processes)
    path = Checkpoint.open(tmp_path / "run").path
    assert path.name.startswith("ba"), printed
    batch = int(path.name.removeprefix("ba").partition("-")[0])
    assert 1 <= batch < 400
    # One rank goes on, a few batches further: the run has kept all that it needs.
    train(load_training_job(config, [*settings, f"train.duration={batch + 2}ba"]))
    assert Checkpoint.open(tmp_path / "run").batch == batch + 2


def test_the_exit_code(config: Path, tmp_path: Path) -> None:
    program = [sys.executable, "train.py", str(config), f"run.folder={tmp_path}/run", "train.duration=4000ba"]
    with subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        metrics = tmp_path / "run" / "metrics.jsonl"
        until = time.monotonic() + 120
        while time.monotonic() < until and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.1)
        running.terminate()
        printed = running.communicate(timeout=60)[0]
    assert running.returncode == 75, printed
    assert "asked to end: the run is saved after batch" in printed
