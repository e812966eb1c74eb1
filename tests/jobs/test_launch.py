"""Launching on two machines, both of which are this one: a run that is asked to end, and one that loses a rank."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from llmprune.conversion.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(data: Path, trained_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"""
run: {{name: test, folder: {tmp_path}/run, seed: 3}}
model: {{path: {trained_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
optimizer: {{lr: 1.0e-3}}
train: {{duration: 20000ba, global_batch_size: 8, microbatch_size: 4, eval_interval: 0ba}}
checkpoint: {{interval: 20000ba}}
loggers: {{console: false}}
""")
    return path


@contextmanager
def launched(config: Path, port: int, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """The job, as soon as both ranks train."""
    shell = config.parent / "ssh"
    shell.write_text('#!/usr/bin/env bash\nshift\nexec bash -c "$*"\n')
    shell.chmod(0o755)
    environment = {**os.environ, "SSH": str(shell), "MAIN": "127.0.0.1", "PORT": str(port)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", "scripts/launch/ssh.sh", "one two", "1", str(config), *overrides]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    ) as running:
        try:
            yield running
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)


def wait_for(metrics: Path) -> None:
    until = time.monotonic() + 150
    while time.monotonic() < until and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.1)
    assert metrics.exists()


def test_asked_to_end_both_machines_save_and_go_on(config: Path) -> None:
    run = config.parent / "run"
    with launched(config, 29711, "run.autoresume=true") as running:
        wait_for(run / "metrics.jsonl")
        running.terminate()
        printed = running.communicate(timeout=120)[0]
    assert running.returncode == 75, printed[-3000:]
    batch = Checkpoint.open(run).batch
    assert 1 <= batch < 20000 and "asked to end" in printed
    with launched(config, 29712, "run.autoresume=true", f"train.duration={batch + 2}ba") as running:
        printed = running.communicate(timeout=150)[0]
    assert running.returncode == 0, printed[-3000:]
    assert Checkpoint.open(run).batch == batch + 2


SRUN = """#!/usr/bin/env bash
# As SLURM's on two nodes: a task on each, and a signal reaches every process.
shift 2
for number in 0 1; do SLURM_NODEID=$number "$@" & done
code=0
for _ in 0 1; do wait -n || code=$?; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1" = show ] && echo 127.0.0.1 || echo "$@" > requeued
"""


def test_a_slurm_job_saves_and_queues_up_again(config: Path) -> None:
    """SIGUSR1, of which SLURM tells every process of the job's steps, however long the launcher would wait."""
    folder = config.parent
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL.replace("requeued", f"{folder}/requeued"))):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "71", "SLURM_JOB_NODELIST": "two"}
    environment |= {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "PORT": "29714", "SLURM_SUBMIT_DIR": str(ROOT)}
    with subprocess.Popen(
        ["bash", "scripts/launch/slurm.sh", str(config)], cwd=ROOT, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0,
    ) as running:  # fmt: skip
        try:
            wait_for(folder / "run" / "metrics.jsonl")
            srun = next(p for p in psutil.Process(running.pid).children() if "srun" in " ".join(p.cmdline()))
            for process in srun.children(recursive=True):
                process.send_signal(signal.SIGUSR1)
            printed = running.communicate(timeout=120)[0]
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 75 and "saved and left: queued up again" in printed, printed[-3000:]
    assert (folder / "requeued").read_text() == "requeue 71\n" and Checkpoint.open(folder / "run").batch >= 1
    assert not (ROOT / ".saved-71").exists()


def test_a_rank_that_dies_ends_the_job_on_both_machines(config: Path) -> None:
    with launched(config, 29713) as running:
        wait_for(config.parent / "run" / "metrics.jsonl")
        processes = psutil.Process(running.pid).children(recursive=True)
        ranks = [p for p in processes if "train.py" in p.cmdline() and "composer" not in " ".join(p.cmdline()[:2])]
        assert len(ranks) == 2, [p.cmdline() for p in processes]
        ranks[1].kill()
        running.communicate(timeout=150)
    assert running.returncode not in (0, 75)
    assert not any(process.is_running() for process in processes)


def test_usage() -> None:
    for script in ("ssh.sh", "slurm.sh", "node.sh"):
        done = subprocess.run(
            ["bash", f"scripts/launch/{script}"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 2 and done.stderr.startswith("usage: ")
        subprocess.run(["bash", "-n", f"scripts/launch/{script}"], cwd=ROOT, check=True, timeout=30)
