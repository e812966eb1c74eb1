"""A job that hangs ends, and says whom it waited for."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune.callbacks.watchdog import judge
from llmprune.checkpoints.metrics import read_metrics
from llmprune.conversion.checkpoint import Checkpoint

ROOT = Path(__file__).parents[2]


def report(events: int, at: str, number: int, **more: Any) -> dict[str, Any]:
    return {"events": events, "at": at, "idle": 60.0, "report": number, "host": "node", "process": 7, **more}


@pytest.mark.parametrize(
    "before, now, ranks, words",
    [
        (
            [9, 7, 9],
            [10, 8, 10],
            [1],
            "the ranks at batch_end of batch 9 wait for rank 1 (process 7 on node), which is",
        ),
        ([9, 9, 7], [10, 10, 7], [2], "no word comes from rank 2 (process 7 on node)"),
        ([9, 9, None], [10, 10, None], [2], "no word comes from rank 2;"),
        ([9, 9, 9], [10, 10, 10], [0, 1, 2], "all ranks are at batch_end of batch 9, and none gets through"),
    ],
)
def test_who_is_to_blame(before: list[Any], now: list[Any], ranks: list[int], words: str) -> None:
    def reports(numbers: list[Any]) -> dict[int, dict[str, Any]]:
        after = 1 if ranks == [1] else None
        return {
            rank: report(4 if rank == after else 9, f"batch_end of batch {5 if rank == after else 9}", number)
            for rank, number in enumerate(numbers)
            if number is not None
        }

    verdict = judge(reports(before), reports(now), 3, patience=50)
    assert (
        verdict is not None
        and verdict["ranks"] == ranks
        and words in verdict["message"]
        and "for 60 s" in verdict["message"]
    )


SLEEPER = """
import sys, time
from pathlib import Path
from composer import Callback
from composer.utils import dist
from llmprune.jobs.train import train
from llmprune.config.job_files import load_training_job

class Sleeper(Callback):
    def before_loss(self, state, logger):
        if dist.get_global_rank() == 1 and state.timestamp.batch.value == 2:
            self.sleep_for_ever()

    def sleep_for_ever(self):
        time.sleep(10000)

if __name__ == "__main__":
    train(load_training_job(sys.argv[1], sys.argv[2:]), [Sleeper()])
"""


def test_two_ranks_of_which_one_hangs(data: Path, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    (tmp_path / "run.yaml").write_text(f"""
run: {{name: test, folder: {tmp_path}/run}}
model: {{path: {model_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
train: {{duration: 8ba, global_batch_size: 4, microbatch_size: 2, hang_timeout: 4}}
checkpoint: {{interval: 1ba}}
loggers: {{console: false}}
""")
    command = [
        str(Path(sys.executable).parent / "composer"),
        "-n",
        "2",
        f"{tmp_path}/sleeper.py",
        f"{tmp_path}/run.yaml",
    ]
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    printed = done.stdout + done.stderr
    assert done.returncode not in (0, 2), printed
    assert "error: nothing has moved for" in printed, printed
    assert "wait for rank 1 (process " in printed and "of batch 2; run.autoresume=true resumes from the last" in printed
    assert "rank 1 stands here" in printed and "in sleep_for_ever" in printed
    assert time.monotonic() - start < 120
    assert (tmp_path / "run/checkpoints/ba2-rank0.pt").is_file()


SLOW = """
import sys, time
from pathlib import Path
from composer import Callback
from composer.utils import dist
from llmprune.jobs.train import train
from llmprune.config.job_files import load_training_job

class Slow(Callback):
    def batch_start(self, state, logger):
        self.start = time.perf_counter()

    def batch_end(self, state, logger):
        if dist.get_global_rank() == 1:
            time.sleep(9 * (time.perf_counter() - self.start))
            Path("slept").write_text(str(state.timestamp.batch.value))

if __name__ == "__main__":
    train(load_training_job(sys.argv[1], ["run.folder=" + sys.argv[2]]))
    train(load_training_job(sys.argv[1], ["run.folder=" + sys.argv[3]]), [Slow()])
"""


def test_a_rank_ten_times_slower_changes_nothing(data: Path, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "run.yaml").write_text(f"""
run: {{name: test, folder: nowhere, seed: 3}}
model: {{path: {model_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
dynamic_loading: {{references: {{letters: 1.0, numbers: 3.0}}, update_delay: 1}}
l0_pruning: {{target: {{layers: 3, hidden: 24}}, lagrangian_warmup: 2ba}}
sharding: {{}}
train: {{duration: 5ba, global_batch_size: 4, microbatch_size: 2, eval_interval: 2ba, hang_timeout: 60}}
loggers: {{console: false}}
""")
    done = subprocess.run(
        [str(Path(sys.executable).parent / "composer"), "-n", "2", "slow.py", "run.yaml", "even", "slow"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "slept").read_text() == "5"
    even, slow = (Checkpoint.open(tmp_path / name) for name in ("even", "slow"))
    assert set(even.state) == set(slow.state) and all(torch.equal(even.state[k], slow.state[k]) for k in even.state)
    lines = [
        [{k: v for k, v in line.items() if not k.startswith(("time/", "speed/"))} for line in read_metrics(path)]
        for path in (tmp_path / "even/metrics.jsonl", tmp_path / "slow/metrics.jsonl")
    ]
    assert lines[0] == lines[1] and len(lines[0]) > 5


def test_a_rank_at_work_is_left_alone() -> None:
    """It copies a checkpoint, say, and notes that it does; the others are further, and wait."""
    reports = {0: report(7, "batch_start of batch 9", 4, idle=1.0), 1: report(9, "before_loss of batch 9", 4)}
    before = {rank: {**one, "report": 3} for rank, one in reports.items()}
    assert judge(before, reports, 2, patience=50) is None
    assert judge(before, {**reports, 0: {**reports[0], "idle": 60.0}}, 2, patience=50) is not None
    silent = judge(before, {**reports, 0: before[0]}, 2, patience=50)
    assert silent is not None and silent["ranks"] == [0]
