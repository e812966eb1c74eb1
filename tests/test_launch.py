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

from llmprune.convert.checkpoint import Checkpoint

ROOT = Path(__file__).parents[1]


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
    for script in ("ssh.sh", "slurm.sh"):
        done = subprocess.run(
            ["bash", f"scripts/launch/{script}"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == 2 and done.stderr.startswith("usage: ")
        subprocess.run(["bash", "-n", f"scripts/launch/{script}"], cwd=ROOT, check=True, timeout=30)
