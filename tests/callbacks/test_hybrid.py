"""Two groups of two ranks, each of which holds the whole model in two parts: every job trains as on one rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmprune.checkpoints.checkpoint_folder import records_in
from llmprune.checkpoints.run_folder import RunFolder
from llmprune.conversion.checkpoint import Checkpoint
from llmprune.conversion.commands import convert
from llmprune.utils.object_store import open_store
from tests.callbacks import fixed_noise, plain_runs

ROOT = Path(__file__).parents[2]
BATCHES = 20
KINDS = {
    "continue": "dynamic_loading={references: {letters: 1.0, numbers: 3.0}, update_delay: 2}",
    "prune": "l0_pruning={target: {layers: 5, hidden: 24, heads: 4}, lagrangian_warmup: 10ba, gate_lr: 0.05}",
    "replace": "block_replacement={start: 2, length: 2, kind: blocks}",
    "parts": "trainable={parameters: [final_norm, last.1], later: {3ba: [norms], 6ba: [all]}}",
    "lora": "lora={dropout: 0.0}",
    "distil": "distillation={teacher: TEACHER, objectives: {kl: 1.0}, final_objectives: {lm: 1.0}, dtype: float32}",
}


@pytest.fixture(scope="module")
def config(data: Path, trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hybrid") / "run.yaml"
    path.write_text(f"""
run: {{name: test, folder: {path.parent}/nowhere, seed: 3}}
model: {{path: {trained_folder}}}
data: {{path: {data}, eval_samples_per_domain: 4}}
optimizer: {{lr: 1.0e-3}}
scheduler: {{warmup: 3ba}}
train: {{duration: {BATCHES}ba, global_batch_size: 8, microbatch_size: 2, eval_interval: 10ba}}
checkpoint: {{interval: 10ba}}
loggers: {{console: false}}
""")
    return path


@pytest.fixture(scope="module")
def runs(config: Path, trained_folder: Path) -> Path:
    """Every kind on one rank and on four."""
    folder, kinds = config.parent, {k: v.replace("TEACHER", str(trained_folder)) for k, v in KINDS.items()}
    for name, changes in kinds.items():
        run = fixed_noise.run if name == "prune" else plain_runs.run
        run(config, changes, f"run.folder={folder}/{name}")
    command = [str(Path(sys.executable).parent / "composer"), "-n", "4", "tests/callbacks/hybrid_runs.py", str(config)]
    more = "sharding={replicas: 2};train.activation_checkpointing=true"
    arguments = [f"{k}-hybrid={v};{more};checkpoint.remote={folder}/store/{k}" for k, v in kinds.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines for name in ("loss/train/total", "metrics/eval/loss") if name in line]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_equal_those_of_one_rank(runs: Path, kind: str) -> None:
    one, four = losses(runs / kind), losses(runs / f"{kind}-hybrid")
    assert len(one) == len(four) == BATCHES + 2
    assert four == pytest.approx(one, rel=1e-5)


def test_gates_are_the_same_on_all_ranks(runs: Path) -> None:
    ranks = [torch.load(runs / "prune-hybrid" / f"history.{rank}") for rank in range(4)]
    assert len(ranks[0]) == BATCHES
    for batch in zip(*ranks, strict=True):
        assert all(torch.equal(batch[0][key], other[key]) for other in batch[1:] for key in batch[0])


@pytest.mark.parametrize("kind", ["prune", "lora"])
def test_the_checkpoint_of_one_group_is_whole(runs: Path, kind: str, tmp_path: Path) -> None:
    """The first group writes it, and vouches for it in the store."""
    records = records_in(path.name for path in (runs / f"{kind}-hybrid" / "checkpoints").iterdir())
    assert {batch: len(names) for batch, names in records.items()} == {10: 2, 20: 2}
    fetched = RunFolder(tmp_path / "fetched")
    fetched.fetch(open_store(f"{runs}/store/{kind}"))
    one, four = Checkpoint.open(runs / kind), Checkpoint.open(tmp_path / "fetched")
    assert four.batch == BATCHES and set(one.state) == set(four.state)
    for name in one.state:
        torch.testing.assert_close(four.state[name], one.state[name], rtol=1e-4, atol=1e-5)
    convert(tmp_path / "fetched", tmp_path / "model")
