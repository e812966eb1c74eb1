"""Pruning on two ranks, data-parallel and sharded, equals pruning on one; killed and resumed, it equals itself."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmprune.conversion.checkpoint import Checkpoint
from llmprune.conversion.commands import convert
from llmprune.conversion.stored_state import _MetadataUnpickler
from llmprune.conversion.verify import compare_models, open_for_comparison
from llmprune.utils.errors import UserError
from tests.callbacks import fixed_noise
from tests.callbacks.fixed_noise import History

ROOT = Path(__file__).parents[2]
BATCHES = 20
ROUNDED = "train.precision=amp_bf16;distillation={};train.duration=4ba;checkpoint.interval=4ba"


@pytest.fixture(scope="module")
def config(data: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    path = folder / "prune.yaml"
    path.write_text(f"""
run: {{name: test, folder: {folder}/one, seed: 3}}
model: {{path: {model_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
dynamic_loading: {{references: {{letters: 1.0, numbers: 3.0}}, update_delay: 2}}
l0_pruning: {{target: {{layers: 3, hidden: 20, heads: 4, intermediate: 32}}, lagrangian_warmup: 10ba, gate_lr: 0.05}}
optimizer: {{lr: 1.0e-3}}
scheduler: {{warmup: 3ba}}
train: {{duration: {BATCHES}ba, global_batch_size: 8, microbatch_size: 2, eval_interval: 10ba}}
checkpoint: {{interval: 10ba}}
loggers: {{console: false}}
""")
    return path


RUNS = {
    "parallel": "",
    "sharded": "sharding={};train.activation_checkpointing=true",
    "killed": "sharding={};train.activation_checkpointing=true;kill=13",
    "sparsity": "sharding={};l0_pruning.target=null;l0_pruning.target_sparsity=0.4;train.duration=3ba",
    "whole": "sharding.checkpoints=whole",
    # Gates that learn from the same model with open gates, products in bfloat16: one set of weights in two passes.
    "rounded": ROUNDED,
    "rounded and sharded": f"{ROUNDED};sharding={{}}",
}


@pytest.fixture(scope="module")
def runs(config: Path) -> Path:
    """All runs on two ranks, one after the other, beside one on a single rank."""
    fixed_noise.run(config)
    fixed_noise.run(config, f"run.folder={config.parent}/one rounded", *ROUNDED.split(";"))
    command = [str(Path(sys.executable).parent / "composer"), "-n", "2", "tests/callbacks/fixed_noise.py", str(config)]
    arguments = [f"{name}={overrides}" for name, overrides in {**RUNS, "hybrid": "sharding.replicas=2"}.items()]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return config.parent


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines for name in ("loss/train/total", "metrics/eval/loss") if name in line]


def gates(run: Path) -> dict[str, torch.Tensor]:
    found = Checkpoint.open(run).gates()
    assert found is not None
    return found.state_dict()


@pytest.mark.parametrize("name", ["parallel", "sharded", "killed", "whole"])
def test_losses_equal_those_of_one_rank(runs: Path, name: str) -> None:
    one, two = losses(runs / "one"), losses(runs / name)
    assert len(one) == len(two) == BATCHES + 2
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("name", ["rounded", "rounded and sharded"])
def test_losses_in_bfloat16_are_near_those_of_one_rank(runs: Path, name: str) -> None:
    one, two = losses(runs / "one rounded"), losses(runs / name)
    assert len(one) == len(two) == 5
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_gates_are_the_same_on_both_ranks_after_every_batch(runs: Path, name: str) -> None:
    ranks: list[History] = [torch.load(runs / name / f"history.{rank}") for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) >= 3
    for a, b in zip(*ranks, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_hybrid_sharding_computes_the_same(runs: Path, config: Path, tmp_path: Path) -> None:
    assert torch.load(runs / "hybrid" / "loss") == pytest.approx(
        fixed_noise.evaluate(config, f"run.folder={tmp_path}/run"), rel=1e-6
    )


def test_a_killed_and_resumed_run_ends_as_the_undisturbed_one(runs: Path) -> None:
    whole, resumed = Checkpoint.open(runs / "sharded"), Checkpoint.open(runs / "killed")
    assert whole.path.name == resumed.path.name == f"ba{BATCHES}" and whole.path.is_dir()
    assert all(torch.equal(whole.weights[name], resumed.weights[name]) for name in whole.weights)
    a, b = gates(runs / "sharded"), gates(runs / "killed")
    assert all(torch.equal(a[name], b[name]) for name in a) and len(a) == 12
    assert losses(runs / "sharded") == losses(runs / "killed")


@pytest.mark.parametrize("name", ["whole", "sharded"])
def test_a_run_goes_on_with_another_number_of_ranks(runs: Path, config: Path, name: str, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(runs / name, copy, symlinks=True)
    checkpoints = copy / "checkpoints"
    (checkpoints / "latest-rank0.pt").unlink()
    (checkpoints / "latest-rank0.pt").symlink_to(next(p for p in checkpoints.glob("ba10*") if p.suffix != ".json").name)
    section = "sharding.checkpoints=whole" if name == "whole" else "sharding={}"
    fixed_noise.run(config, f"run.folder={copy}", "run.autoresume=true", section)
    assert losses(copy) == pytest.approx(losses(runs / "one"), rel=1e-5)
    expected, found = gates(runs / "one"), gates(copy)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sharded", "whole", "sparsity"])
def test_sharded_and_whole_checkpoints_convert(runs: Path, name: str, tmp_path: Path) -> None:
    plan = convert(runs / name, tmp_path / "out")
    assert name == "sparsity" or plan.shape.hidden == 20
    assert compare_models(open_for_comparison(runs / name), open_for_comparison(tmp_path / "out")).max_rel <= 1e-5


def test_damaged_or_dangerous_shards_are_refused(runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(runs / "sharded", copy, symlinks=True)
    folder = copy / "checkpoints" / f"ba{BATCHES}"
    shard = folder / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(UserError, match="2,000 bytes instead of"):
        convert(folder, tmp_path / "out")
    for record in folder.parent.glob(f"ba{BATCHES}.sums-*.json"):
        record.unlink()
    with pytest.raises(UserError, match="damaged or incomplete"):
        convert(folder, tmp_path / "out")
    shard.unlink()
    with pytest.raises(UserError, match="damaged or incomplete"):
        convert(copy, tmp_path / "out")
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR.")
    with pytest.raises(UserError, match=r"no readable checkpoint \(it refers to os.system\)"):
        convert(folder, tmp_path / "out")
    attribute = "cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\n{}\nS'{}'\ntR."
    (folder / ".metadata").write_bytes(attribute.format("Metadata", "__init__").encode())
    with pytest.raises(UserError, match="it refers to an attribute of"):
        convert(folder, tmp_path / "out")
    member = attribute.format("_MEM_FORMAT_ENCODING", "TORCH_PRESERVE_FORMAT").encode()  # as older Pythons write it
    assert _MetadataUnpickler(io.BytesIO(member)).load().name == "TORCH_PRESERVE_FORMAT"
    assert not (tmp_path / "owned").exists() and not (tmp_path / "out").exists()
