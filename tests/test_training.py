"""Whole runs: resuming, stopping, and refusing what can't work."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from transformers import AutoModelForCausalLM

from llmprune.config import Config, load_config
from llmprune.convert.checkpoint import Checkpoint
from llmprune.data.format import DataManifest
from llmprune.errors import UserError
from llmprune.training import build_trainer, check, train


@pytest.fixture
def yaml(data: Path, model_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "prune.yaml"
    path.write_text(f"""
run: {{name: test, folder: {tmp_path}/run, seed: 3}}
model: {{path: {model_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
l0_pruning: {{target: {{layers: 3, hidden: 20, heads: 4, intermediate: 32}}, lagrangian_warmup: 4ba}}
optimizer: {{lr: 1.0e-3}}
scheduler: {{warmup: 2ba}}
train: {{duration: 6ba, global_batch_size: 8, microbatch_size: 4, eval_interval: 3ba}}
checkpoint: {{interval: 3ba}}
loggers: {{console: false}}
""")
    return path


class Killed(BaseException):
    """As if the process had died."""


class KillAt(Callback):
    """Dies in the middle of a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def after_forward(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == self.batch:
            raise Killed


def run_killed(config: Config, batch: int) -> None:
    trainer = build_trainer(config)
    trainer.state.callbacks.append(KillAt(batch))
    with pytest.raises(Killed):
        trainer.fit()
    trainer.close()


def numbers(metrics: Path) -> list[tuple[int, str, float]]:
    """Every logged loss and sparsity by batch, without timings."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    chosen = ("loss/", "l0/", "metrics/", "lr-")
    return [(line["batch"], name, line[name]) for line in lines for name in sorted(line) if name.startswith(chosen)]


def test_a_killed_and_resumed_run_ends_as_the_undisturbed_one(yaml: Path, tmp_path: Path) -> None:
    train(load_config(yaml))
    whole = tmp_path / "whole"
    (tmp_path / "run").rename(whole)
    run_killed(load_config(yaml), batch=4)
    with pytest.raises(UserError, match="run.autoresume=true"):
        train(load_config(yaml))
    train(load_config(yaml, ["run.autoresume=true"]))

    train(load_config(yaml, ["run.autoresume=true"]))  # once more, at its end: nothing changes

    a, b = Checkpoint.open(whole), Checkpoint.open(tmp_path / "run")
    assert a.path.name == b.path.name == "ba6-rank0.pt"
    assert a.fingerprint() == b.fingerprint()
    gates = [checkpoint.gates() for checkpoint in (a, b)]
    assert gates[0] is not None and gates[1] is not None
    for name, value in gates[0].state_dict().items():
        assert torch.equal(value, gates[1].state_dict()[name]), name
    assert numbers(whole / "metrics.jsonl") == numbers(tmp_path / "run" / "metrics.jsonl")


def test_a_run_learns_and_leaves_a_folder_that_explains_itself(yaml: Path, tmp_path: Path) -> None:
    overrides = [
        "l0_pruning=null",
        "train.duration=30ba",
        "train.eval_interval=15ba",
        "train.eval_first=true",
        "optimizer.lr=0.01",
    ]
    train(load_config(yaml, overrides))
    run = tmp_path / "run"
    assert load_config(run / "config.yaml").train.duration == "30ba"
    losses = [value for _, name, value in numbers(run / "metrics.jsonl") if name == "metrics/eval/loss"]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0] - 1
    manifest = json.loads((run / "checkpoints" / "manifest.json").read_text())
    assert manifest["family"] == "llama" and manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    assert AutoModelForCausalLM.from_config(Checkpoint.open(run).config) is not None


def test_a_resumed_run_must_be_the_same_model_and_target(yaml: Path) -> None:
    run_killed(load_config(yaml), batch=4)
    with pytest.raises(UserError, match="keep the target"):
        train(load_config(yaml, ["run.autoresume=true", "l0_pruning.target.hidden=16"]))
    other = [
        "model.path=null",
        "model.config={model_type: llama, hidden_size: 32, num_hidden_layers: 3}",
        "l0_pruning=null",
    ]
    with pytest.raises(UserError, match="resume with the model that the run began with"):
        train(load_config(yaml, ["run.autoresume=true", *other]))


def test_a_nan_loss_stops_and_keeps_the_last_checkpoint(yaml: Path, tmp_path: Path) -> None:
    class Poison(Callback):
        def before_backward(self, state: State, logger: Logger) -> None:
            if state.timestamp.batch.value == 4:
                state.loss = state.loss * float("nan")  # type: ignore[operator]

    trainer = build_trainer(load_config(yaml))
    trainer.state.callbacks.append(Poison())
    with pytest.raises(UserError, match=r"the loss is nan at batch 4 \(samples 32 to 39\)"):
        trainer.fit()
    trainer.close()
    checkpoint = Checkpoint.open(tmp_path / "run")
    assert checkpoint.path.name == "ba3-rank0.pt"
    assert all(checkpoint.weights[name].isfinite().all() for name in checkpoint.weights)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("l0_pruning.target.hidden=64", "target hidden 64 must lie between 1 and the source's 32"),
        ("l0_pruning.target.heads=3", "choose 2 or 4"),
        ("data.path=nowhere", "holds no prepared data"),
        ("model.path=nowhere/at-all", "neither a folder nor reachable"),
        ("model.config={model_type: llama}", "not both"),
        ("optimizer.name=adamv", "did you mean 'adamw'"),
        ("scheduler.name=cosin", "did you mean 'cosine'"),
        ("train.duration=1ep", "the stream has no end"),
        ("train.duration=soon", "no duration"),
        ("scheduler.warmup=100tok", "must have the unit"),
        ("train.microbatch_size=0", "positive whole number or auto"),
        ("train.precision=amp_bf16", "needs a GPU"),
        ("model.attention=flash_attention_2", r"pip install -e '.\[gpu\]'"),
        ("loggers.wandb={project: x}", r"pip install -e '.\[wandb\]'"),
        ("model.dtype=float8", "did you mean .float32"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    yaml: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        train(load_config(yaml, [override]))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_tokenizer_that_did_not_make_the_data_is_refused(yaml: Path, data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "data")
    manifest = DataManifest.load(copy)
    manifest.tokenizer = "another"
    manifest.save(copy)
    with pytest.raises(UserError, match="did not make the data"):
        check(load_config(yaml, [f"data.path={copy}"]))


def test_a_folder_that_is_no_run_is_not_overwritten(yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something that is no run"):
        train(load_config(yaml, ["run.overwrite=true"]))
    assert (tmp_path / "run" / "thesis.txt").exists()


def test_other_choices(yaml: Path, tmp_path: Path) -> None:
    choices = ["train.duration=512tok", "scheduler.warmup=0.1dur", "scheduler.name=linear", "optimizer.name=adamw"]
    more = ["train.eval_interval=0ba", "train.clip_norm=null", "loggers.tensorboard=true", "data.workers=2"]
    trainer = train(load_config(yaml, [*choices, *more]))
    assert trainer.state.timestamp.batch.value == 2
    assert list((tmp_path / "run" / "tensorboard").rglob("events*"))
    assert not any(name.startswith("metrics/") for _, name, _ in numbers(tmp_path / "run" / "metrics.jsonl"))
