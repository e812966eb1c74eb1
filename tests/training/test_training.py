"""Whole runs: resuming, stopping, and refusing what can't work."""

import json
import re
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from transformers import AutoModelForCausalLM

from data_prep.conversations import ConversationSettings
from data_prep.pack import prepare
from data_prep.recipe import PackSettings
from llmprune.callbacks.l0_pruning import L0Pruning
from llmprune.config.job_files import load_training_job
from llmprune.config.optimizers import OPTIMIZERS, OptimizerConfig
from llmprune.config.schema import Config
from llmprune.conversion.checkpoint import Checkpoint
from llmprune.conversion.commands import convert
from llmprune.data.dataset import EvalDataset
from llmprune.data.format import DataManifest
from llmprune.data.prepared import PreparedData
from llmprune.evaluation.losses import evaluate_losses
from llmprune.jobs.train import train
from llmprune.models.loading import load_model
from llmprune.training.checks import check
from llmprune.training.trainer import build_trainer
from llmprune.utils.errors import UserError
from tests.callbacks.fixed_noise import KillAt, Killed


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
    train(load_training_job(yaml))
    whole = tmp_path / "whole"
    (tmp_path / "run").rename(whole)
    run_killed(load_training_job(yaml), batch=4)
    with pytest.raises(UserError, match="run.autoresume=true"):
        train(load_training_job(yaml))
    train(load_training_job(yaml, ["run.autoresume=true"]))

    train(load_training_job(yaml, ["run.autoresume=true"]))  # once more, at its end: nothing changes

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
    train(load_training_job(yaml, overrides))
    run = tmp_path / "run"
    assert load_training_job(run / "config.yaml").train.duration == "30ba"
    losses = [value for _, name, value in numbers(run / "metrics.jsonl") if name == "metrics/eval/loss"]
    assert len(losses) == 3 and losses[2] < losses[1] < losses[0] - 1
    manifest = json.loads((run / "checkpoints" / "manifest.json").read_text())
    assert manifest["family"] == "llama" and manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    assert AutoModelForCausalLM.from_config(Checkpoint.open(run).config) is not None


@pytest.fixture
def unevaluated(data: Path, tmp_path: Path) -> Path:
    """Ten conversations, none of which is kept for evaluation."""
    lines = [json.dumps({"prompt": f"{n} one two", "response": "three four five"}) for n in range(10)]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    settings = PackSettings(64, eval_fraction=0, conversations=ConversationSettings("none"))
    prepare([tmp_path / "few.jsonl"], data / "tokenizer", tmp_path / "few", settings, processes=1)
    assert not PreparedData(tmp_path / "few").domains_with("eval")
    return tmp_path / "few"


def test_what_does_not_evaluate_needs_no_evaluation_samples(yaml: Path, unevaluated: Path, tmp_path: Path) -> None:
    few = [f"data.path={unevaluated}", "train.global_batch_size=2", "train.microbatch_size=2", "train.duration=2ba"]
    trained = train(load_training_job(yaml, [*few, "l0_pruning=null", "train.eval_interval=0ba"]))
    assert trained.state.timestamp.batch.value == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["train.eval_interval=1ba"], r"train.eval_interval=1ba needs them: .*or train without evaluation"),
        (["train.eval_first=true"], r"train.eval_first needs them: prepare it with a larger --eval-fraction$"),
        (
            ["~l0", "l0_pruning.target_sparsity=0.5", "l0_pruning.target=null", "train.duration=6ba"],
            r"the last report of l0_pruning.target_sparsity needs them",
        ),
        (["block_replacement={start: 1, length: 1, kind: none}", "train.duration=0ba"], "a job that does not train"),
    ],
)
def test_what_evaluates_needs_evaluation_samples(
    yaml: Path, unevaluated: Path, tmp_path: Path, changes: list[str], message: str
) -> None:
    few = [f"data.path={unevaluated}", "train.global_batch_size=2", "train.microbatch_size=2", "train.duration=2ba"]
    pruned = changes[0] == "~l0"
    overrides = [*few, "train.eval_interval=0ba", *([] if pruned else ["l0_pruning=null"]), *changes[pruned:]]
    with pytest.raises(UserError, match=f"has no evaluation samples, and {message}"):
        train(load_training_job(yaml, overrides))
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_must_be_the_same_model_and_target(yaml: Path) -> None:
    run_killed(load_training_job(yaml), batch=4)
    with pytest.raises(UserError, match="keep what the run began with"):
        train(load_training_job(yaml, ["run.autoresume=true", "l0_pruning.target.hidden=16"]))
    for change in ("run.seed=4", "train.global_batch_size=4"):
        with pytest.raises(UserError, match=f"with {change.split('=')[0]} [38]; the config asks for 4"):
            train(load_training_job(yaml, ["run.autoresume=true", change]))
    for change in (
        "data.weights={letters: 1}",
        "data.shuffle_window=2",
        "data.document_boundaries=true",
        "data.partitions=2",
    ):
        with pytest.raises(UserError, match=f"of a run with {change.split('=')[0]} .*keep what the run began with"):
            train(load_training_job(yaml, ["run.autoresume=true", change]))
    other = [
        "model.path=null",
        "model.config={model_type: llama, hidden_size: 32, num_hidden_layers: 3}",
        "l0_pruning=null",
    ]
    with pytest.raises(UserError, match="resume with the model that the run began with"):
        train(load_training_job(yaml, ["run.autoresume=true", *other]))


def test_a_nan_loss_stops_and_keeps_the_last_checkpoint(yaml: Path, tmp_path: Path) -> None:
    class Poison(Callback):
        def before_loss(self, state: State, logger: Logger) -> None:
            if state.timestamp.batch.value == 4:
                state.outputs = state.outputs * float("nan")

    trainer = build_trainer(load_training_job(yaml))
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
        ("callbacks={typo: {}}", "there is no callback 'typo'"),
        ("loggers.others={mlfow: {}}", "there is no logger 'mlfow'; did you mean 'mlflow'"),
        ("loggers.others={mlflow: {}}", "the package mlflow is not installed: pip install mlflow"),
        ("optimizer.name=adamv", "did you mean 'adamw'"),
        ("scheduler.name=cosin", "did you mean 'cosine'"),
        ("train.duration=1ep", "the stream has no end"),
        ("train.duration=soon", "no duration"),
        ("scheduler.warmup=100tok", "must have the unit"),
        ("train.microbatch_size=0", "train.microbatch_size is 0; it must be positive, or auto"),
        ("train.microbatch_size=auto", "does not work while gates train"),
        ("sharding={replicas: 2}", "must divide the number of ranks"),
        ("sharding={checkpoints: half}", "sharding.checkpoints 'half' is unknown; valid: sharded, whole"),
        ("optimizer.lr=-1", "zero or positive"),
        ("optimizer.betas=[0.9]", "two numbers"),
        ("run.seed=-1", "lie between 0"),
        ("data.workers=-1", "lie between 0 and 64"),
        ("data.workers=100000", "data.workers is 100000; it must lie between 0 and 64"),
        ("data.prefetch=1000000000", "lie between 1 and 1,024"),
        ("train.global_batch_size=1000000000", r"is 1,000,000,000, but the data have 1?\d\d training samples in all"),
        ("data.shuffle_window=0", "must be positive"),
        ("data.eval_samples_per_domain=0", "it must be positive, or null"),
        ("train.device=gpu", "this machine has no GPU"),
        ("train.device=tpu", "did you mean|valid"),
        ("train.duration=2.5ba", "no duration"),
        ("train.eval_interval=-1ba", "zero or positive"),
        ("train.clip_norm=-1", "positive, or null"),
        ("scheduler.final=-2", "between 0 and 1"),
        ("loggers.console_interval=abc", "no duration"),
        ("checkpoint.interval=0ba", "must be positive"),
        ("checkpoint.keep=0", "positive, or -1"),
        ("train.loss_spike=ignore", "train.loss_spike"),
        ("l0_pruning.target_sparsity=0.5", "not both"),
        ("l0_pruning.gates=[hidden]", "goes with target_sparsity"),
        ("l0_pruning.target={attention_layers: 9}", "must lie between 1 and the 4 blocks"),
        ("l0_pruning.target={attention_layers: 2, hidden: 24}", "choose layer, or attention and mlp"),
        ("l0_pruning={target_sparsity: 0.9, gates: [kv_group]}", "the most that gates on kv_group can remove"),
        ("l0_pruning={target_sparsity: 0.3, gates: [hiden]}", "did you mean 'hidden'"),
        ("l0_pruning={}", "give either l0_pruning.target"),
        ("l0_pruning.multiples.hidden=99", "must lie between 1 and"),
        ("l0_pruning.lagrangian_warmup=1ep", "ba, sp, tok or dur"),
        ("l0_pruning.gate_lr=-1", "zero or positive"),
        ("train.duration=1" + "0" * 30 + "ba", "longer than any run"),
        ("train.duration=1" + "0" * 5000 + "tok", "no duration"),
        ("checkpoint.interval=1" + "0" * 30 + "ba", "longer than any run"),
        ("scheduler.warmup=1" + "0" * 400 + "dur", "longer than any run|no duration"),
        ("l0_pruning.lagrangian_warmup=1" + "0" * 30 + "ba", "longer than any run"),
        ("train.hang_timeout=1e8", r"lie in \(0, 10,000,000\], or null"),
        ("optimizer.weight_decay=inf", "a number of at most"),
        ("model={attention: flash_attention_2, dtype: bfloat16}", r"pip install -e '.\[gpu\]'"),
        ("loggers.wandb={project: x}", r"pip install -e '.\[wandb\]'"),
        ("model.dtype=float8", "valid: float32, bfloat16"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    yaml: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        train(load_training_job(yaml, [override]))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_flash_attention_in_full_precision_is_refused(yaml: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"take train.precision=amp_bf16, or model.dtype=bfloat16"):
        train(load_training_job(yaml, ["model.attention=flash_attention_2", "train.precision=fp32"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", ["auto", "2"])
def test_with_automatic_microbatches_evaluation_fits_itself_to_memory(
    yaml: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    monkeypatch.setattr("llmprune.training.checks._check_devices", lambda config: None)  # they are for GPUs
    monkeypatch.setattr("llmprune.training.trainer.Trainer", lambda **settings: settings["model"])
    model = build_trainer(load_training_job(yaml, [f"train.microbatch_size={size}"]))
    assert (model.halving is not None) == (size == "auto")  # type: ignore[attr-defined]


def test_a_mistake_found_late_leaves_the_old_run_alone(yaml: Path, tmp_path: Path) -> None:
    train(load_training_job(yaml))
    with pytest.raises(UserError, match="weights"):
        train(load_training_job(yaml, ["run.overwrite=true", "data.weights={nowhere: 1.0}"]))
    assert Checkpoint.open(tmp_path / "run").batch == 6


def test_nothing_to_resume_is_said(yaml: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_killed(load_training_job(yaml), batch=1)
    train(load_training_job(yaml, ["run.autoresume=true", "train.duration=1ba", "scheduler.warmup=0ba"]))
    assert "holds no complete checkpoint to resume from" in capfd.readouterr().out


def test_a_torn_line_of_metrics_hinders_nobody(yaml: Path, tmp_path: Path) -> None:
    run_killed(load_training_job(yaml), batch=4)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"batch": 3, "loss/tr')
    train(load_training_job(yaml, ["run.autoresume=true"]))
    assert [json.loads(line) for line in metrics.read_text().splitlines()]
    convert(tmp_path / "run", tmp_path / "out")


def test_activation_checkpointing_changes_nothing(yaml: Path, tmp_path: Path) -> None:
    train(load_training_job(yaml, ["train.duration=3ba"]))
    plain = numbers(tmp_path / "run" / "metrics.jsonl")
    train(load_training_job(yaml, ["train.duration=3ba", "train.activation_checkpointing=true", "run.overwrite=true"]))
    assert numbers(tmp_path / "run" / "metrics.jsonl") == plain


def test_a_loss_spike_is_logged_and_on_request_skipped(
    yaml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Spike(Callback):
        weights: ClassVar[list[torch.Tensor]] = []

        def after_forward(self, state: State, logger: Logger) -> None:
            if state.timestamp.batch.value == 22:
                state.outputs = state.outputs * 100

        def batch_end(self, state: State, logger: Logger) -> None:
            gates = next(c for c in state.callbacks if isinstance(c, L0Pruning)).gates
            flat = [p.detach().flatten() for p in (*state.model.parameters(), *gates.parameters())]
            self.weights.append(torch.cat(flat))

    for action in ("log", "skip"):
        Spike.weights.clear()
        overrides = [f"train.loss_spike={action}", "train.duration=24ba", "run.overwrite=true"]
        trainer = build_trainer(load_training_job(yaml, overrides))
        trainer.state.callbacks.append(Spike())
        trainer.fit()
        trainer.close()
        assert torch.equal(Spike.weights[22], Spike.weights[21]) == (action == "skip")
        assert not torch.equal(Spike.weights[23], Spike.weights[22])
        assert "the loss jumps from" in caplog.text and "batch 22 (samples 176 to 183)" in caplog.text
        caplog.clear()
    spikes = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in spikes if "loss/spike" in line] == [22]


def test_pruning_to_a_size_prints_what_uniform_blocks_cost(
    yaml: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(load_training_job(yaml, ["l0_pruning={target_sparsity: 0.5}", "train.duration=40ba"]))
    printed = capfd.readouterr().out
    assert "the model is cut to one shape for all blocks; those of the size wanted:" in printed
    rivals = re.findall(r"^  (layers .*): loss ([\d.]+)( chosen)?$", printed, re.MULTILINE)
    (found,) = [rival for rival in rivals if rival[2]]
    assert len(rivals) > 1 and float(found[1]) == min(float(loss) for _, loss, _ in rivals)
    chosen = tmp_path / "run/checkpoints/shape.json"
    once = chosen.read_bytes()
    chosen.unlink()  # as a kill after the last checkpoint would leave it
    train(load_training_job(yaml, ["l0_pruning={target_sparsity: 0.5}", "train.duration=40ba", "run.autoresume=true"]))
    assert chosen.read_bytes() == once
    plan = convert(tmp_path / "run", tmp_path / "out")
    assert str(plan.shape) == found[0]
    loss = evaluate_losses(
        load_model(tmp_path / "out"), PreparedData(load_training_job(yaml).data.path), samples_per_domain=2
    ).loss
    assert loss == pytest.approx(float(found[1]), abs=1e-3)


@pytest.mark.parametrize("name", ["decoupled_lion", "decoupled_adamw", "adamw"])
def test_optimisers_take_their_settings(name: str) -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = OPTIMIZERS[name]([parameter], OptimizerConfig(name, lr=0.1, betas=[0.5, 0.7], weight_decay=0.01))
    assert optimizer.defaults["lr"] == 0.1 and optimizer.defaults["betas"] == (0.5, 0.7)
    parameter.grad = torch.tensor([3.0, 0.0])
    optimizer.step()
    decay = 0.01 if name.startswith("decoupled") else 0.1 * 0.01  # decoupled: not times the base learning rate
    torch.testing.assert_close(parameter.data, torch.tensor([1.0, -2.0]) * (1 - decay) - torch.tensor([0.1, 0.0]))


def test_a_tokenizer_that_did_not_make_the_data_is_refused(yaml: Path, data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "data")
    manifest = DataManifest.load(copy)
    manifest.tokenizer = "another"
    manifest.save(copy)
    with pytest.raises(UserError, match="did not make the data"):
        check(load_training_job(yaml, [f"data.path={copy}"]))


def test_a_folder_that_is_no_run_is_not_overwritten(yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="llmprune did not make"):
        train(load_training_job(yaml, ["run.overwrite=true"]))
    assert (tmp_path / "run" / "thesis.txt").exists()


def test_other_choices(yaml: Path, tmp_path: Path) -> None:
    choices = ["train.duration=512tok", "scheduler.warmup=0.1dur", "scheduler.name=linear", "optimizer.name=adamw"]
    more = ["train.eval_interval=0ba", "train.clip_norm=null", "loggers.tensorboard=true", "data.workers=2"]
    trainer = train(load_training_job(yaml, [*choices, *more]))
    assert trainer.state.timestamp.batch.value == 2
    assert list((tmp_path / "run" / "tensorboard").rglob("events*"))
    assert not any(name.startswith("metrics/") for _, name, _ in numbers(tmp_path / "run" / "metrics.jsonl"))


def test_training_within_documents(yaml: Path, data: Path, tmp_path: Path) -> None:
    """The evaluation loss is that of each document alone, its first token left out."""
    overrides = ["l0_pruning=null", "data.document_boundaries=true", "train.duration=2ba"]
    trainer = train(load_training_job(yaml, overrides))
    found = float(trainer.state.eval_metric_values["loss"])
    convert(tmp_path / "run", tmp_path / "out")
    model, total, count = load_model(tmp_path / "out").eval(), 0.0, 0
    samples = EvalDataset(PreparedData(data), 2, boundaries=True)
    for place in range(len(samples)):
        sample = samples[place]
        begins = [i for i, position in enumerate(sample["position_ids"].tolist()) if position == 0]
        for begin, end in zip(begins, [*begins[1:], 32], strict=True):
            if end - begin > 1:
                document = sample["input_ids"][None, begin:end]
                with torch.no_grad():
                    total += float(model(input_ids=document, labels=document).loss) * (end - begin - 1)
                count += end - begin - 1
    assert found == pytest.approx(total / count, rel=1e-5)
