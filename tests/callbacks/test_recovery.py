"""Partial training, adapters and distillation: what trains, what stays, ranks, kills, export, mistakes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llmprune.config.job_files import load_training_job
from llmprune.config.optimizers import OPTIMIZERS, OptimizerConfig
from llmprune.conversion.checkpoint import Checkpoint
from llmprune.conversion.commands import apply, convert, export_adapter
from llmprune.conversion.export import keep_everything
from llmprune.conversion.verify import compare_models, open_for_comparison
from llmprune.jobs.train import train
from llmprune.models.loading import load_model, load_model_config
from llmprune.models.parameters import init_optimizer_state
from llmprune.models.stored_weights import StoredWeights, fingerprint
from llmprune.plans.plan import KeptBlock
from llmprune.training.trainer import build_trainer
from llmprune.utils.errors import UserError
from tests.callbacks import plain_runs
from tests.callbacks.test_block_replacement import metrics

ROOT = Path(__file__).parents[2]
BATCHES, UNTIL = 20, 8  # the latter for runs that are killed
BLOCKS, HIDDEN = (0, 1, 4, 5), tuple(n for n in range(32) if n % 4 != 3)


@pytest.fixture(scope="module")
def student(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of six blocks and 24 of 32 hidden dimensions of the trained model."""
    folder = tmp_path_factory.mktemp("student") / "cut"
    config = load_model_config(trained_folder)
    whole = keep_everything(config, fingerprint(StoredWeights(trained_folder), config))
    apply(trained_folder, replace(whole, blocks=tuple(map(KeptBlock.whole, BLOCKS)), hidden=HIDDEN), folder)
    return folder


@pytest.fixture(scope="module")
def config(data: Path, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recover")
    path = folder / "recover.yaml"
    path.write_text(f"""
run: {{name: test, folder: {folder}/one, seed: 3}}
model: {{path: {student}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
optimizer: {{lr: 3.0e-3, weight_decay: 1.0e-3}}
scheduler: {{warmup: 3ba}}
train: {{duration: {BATCHES}ba, global_batch_size: 8, microbatch_size: 2, eval_interval: 10ba}}
checkpoint: {{interval: 10ba}}
loggers: {{console: false}}
""")
    return path


def kinds(teacher: Path) -> dict[str, str]:
    """What each kind of recovery adds to the config; ranks drop other inputs of adapters, so nothing is dropped."""
    return {
        "parts": "trainable={parameters: [final_norm, last.1], later: {3ba: [norms, block.0], 6ba: [all]}}",
        "lora": "lora={dropout: 0.0}",
        "teacher": f"distillation={{teacher: {teacher}, dtype: float32, temperature: 2.0, "
        "objectives: {local: 1.0}, final_objectives: {kl: 1.0, mse: 0.5, cosine: 0.1, lm: 1.0}}",
        "both": f"lora={{dropout: 0.0}};distillation={{teacher: {teacher}, dtype: float32, top_k: 20}}",
    }


SHARDED = "sharding={};train.activation_checkpointing=true"
KINDS = ["parts", "lora", "teacher", "both"]


@pytest.fixture(scope="module")
def runs(config: Path, trained_folder: Path) -> Path:
    """Every kind on one rank, and on two: data-parallel, sharded, killed and resumed."""
    found = kinds(trained_folder)
    folder = config.parent
    for name, changes in found.items():
        plain_runs.run(config, f"run.folder={folder}/{name}", *changes.split(";"))
    arguments = []
    for name, changes in found.items():
        arguments += [f"{name}-two={changes}", f"{name}-sharded={SHARDED};{changes}"]
        short = f"train.duration={UNTIL}ba;checkpoint.interval=3ba;" + changes.replace("dropout: 0.0", "dropout: 0.3")
        arguments += [f"{name}-whole={SHARDED};{short}", f"{name}-killed={SHARDED};{short};kill=5"]
    command = [str(Path(sys.executable).parent / "composer"), "-n", "2", "tests/callbacks/plain_runs.py", str(config)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("ranks", ["two", "sharded"])
@pytest.mark.parametrize("name", KINDS)
def test_losses_equal_those_of_one_rank(runs: Path, name: str, ranks: str) -> None:
    wanted = ["loss/train/total", "metrics/eval/loss", "distillation/kl", "distillation/mse"]
    one, two = (metrics(runs / run, *wanted) for run in (name, f"{name}-{ranks}"))
    distils = {"teacher": 2, "both": 1}.get(name, 0)
    assert len(one) == len(two) == BATCHES * (1 + distils) + 2
    assert two == pytest.approx(one, rel=1e-5)
    if name != "teacher":  # whose objectives change on the way
        losses = metrics(runs / name, "loss/train/total")
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", KINDS)
def test_a_killed_and_resumed_run_ends_as_the_undisturbed_one(runs: Path, name: str) -> None:
    whole, resumed = (Checkpoint.open(runs / f"{name}-{end}") for end in ("whole", "killed"))
    assert whole.path.name == resumed.path.name == f"ba{UNTIL}"
    assert set(whole.state) == set(resumed.state)
    assert all(torch.equal(whole.state[key], resumed.state[key]) for key in whole.state)


def changed(run: Path, before: Path) -> set[str]:
    stored, found = StoredWeights(before), Checkpoint.open(run).weights
    return {name for name in stored if name in list(found) and not torch.equal(stored[name], found[name])}


@pytest.mark.parametrize("ranks", ["", "-two", "-sharded"])
def test_adapters_leave_their_base_as_it_is(runs: Path, student: Path, ranks: str) -> None:
    state = Checkpoint.open(runs / f"lora{ranks}").state
    stored = StoredWeights(student)
    own = {name.removeprefix("model.").replace(".base_layer.", "."): name for name in state if ".lora_" not in name}
    assert all(torch.equal(stored[name], state[own[name]]) for name in stored)
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    assert changed(runs / f"lora{ranks}", student) == {
        f"model.layers.{block}.{name}.weight"
        for block in range(4)
        for name in (*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }


def test_phases_freeze_and_unfreeze(config: Path, student: Path, tmp_path: Path) -> None:
    """Weights that are frozen again stay as the phase before left them."""
    later = "{4ba: [norms, block.0], 6ba: [model.layers.*.mlp.up_proj]}"
    text = f"trainable={{parameters: [final_norm, last.1], later: {later}}}"
    overrides = [
        f"run.folder={tmp_path}/run",
        text,
        "checkpoint.interval=1ba",
        "checkpoint.keep=-1",
        "scheduler.warmup=0ba",
    ]
    train(load_training_job(config, overrides))
    states = [Checkpoint.open(tmp_path / f"run/checkpoints/ba{n}-rank0.pt").state for n in range(1, BATCHES + 1)]
    stored = StoredWeights(student)
    states.insert(0, {f"model.{name}": stored[name] for name in stored})
    for batch in range(BATCHES):
        moved = {
            name.removeprefix("model.")
            for name in states[0]
            if not torch.equal(states[batch][name], states[batch + 1][name])
        }
        blocks = [{name for name in stored if name.startswith(f"model.layers.{n}.")} for n in range(4)]
        norms = {name for name in stored if "norm" in name}
        ups = {f"model.layers.{n}.mlp.up_proj.weight" for n in range(4)}
        assert moved == ({"model.norm.weight"} | blocks[3] if batch < 4 else norms | blocks[0] if batch < 6 else ups)


def test_frozen_weights_cost_no_gradient(config: Path, tmp_path: Path) -> None:
    trainer = build_trainer(
        load_training_job(config, [f"run.folder={tmp_path}/run", "trainable={parameters: [block.3]}"])
    )
    trainer.fit()
    trainer.close()
    trained = {name for name, p in trainer.state.model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("model.model.layers.3.") for name in trained)
    assert sum(len(group["params"]) for group in trainer.state.optimizers[0].param_groups) == len(trained)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_primed_optimiser_steps_as_a_new_one(name: str) -> None:
    ends = []
    for primed in (False, True):
        parameter = torch.nn.Parameter(torch.arange(4.0))
        optimizer = OPTIMIZERS[name]([parameter], OptimizerConfig(lr=0.1, weight_decay=0.1))
        if primed:
            init_optimizer_state(optimizer)
            assert torch.equal(parameter, torch.arange(4.0))
        for step in range(3):
            parameter.grad = torch.tensor([1.0, -2.0, 0.5, 0.0]) * (step + 1)
            optimizer.step()
        ends.append(parameter.detach())
    assert torch.equal(*ends)


@pytest.fixture(scope="module")
def four_bits(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a base of four bits, and one that is interrupted."""
    folder = tmp_path_factory.mktemp("nf4")
    changes = ["lora={quantize: nf4, rank: 4, targets: [attention, mlp.up_proj]}"]
    plain_runs.run(config, f"run.folder={folder}/whole", *changes)
    plain_runs.run(config, f"run.folder={folder}/killed", *changes, kill=5)
    plain_runs.run(config, f"run.folder={folder}/killed", *changes, "run.autoresume=true")
    return folder


def test_a_run_on_four_bits_goes_on_after_a_kill(four_bits: Path, student: Path) -> None:
    whole, resumed = (Checkpoint.open(four_bits / name).state for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    name = "model.layers.2.mlp.down_proj.weight"
    assert whole[f"model.{name}"].numel() * 2 == StoredWeights(student)[name].numel()  # two in a byte
    losses = metrics(four_bits / "whole", "loss/train/total")
    assert losses[-1] < losses[0]


def test_four_bits_are_written_out_as_they_were_computed_with(four_bits: Path, student: Path) -> None:
    """Independently: a matrix without an adapter is the source's, quantised by bitsandbytes and written out again."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    name = "model.layers.1.mlp.down_proj.weight"
    wanted = dequantize_4bit(*quantize_4bit(StoredWeights(student)[name], quant_type="nf4", compress_statistics=True))
    assert torch.equal(Checkpoint.open(four_bits / "whole").weights[name], wanted)


@pytest.mark.parametrize("name", ["lora", "lora-two", "lora-sharded", "lora-killed", "four_bits"])
def test_merged_is_adapted(
    runs: Path, four_bits: Path, config: Path, student: Path, name: str, tmp_path: Path, data: Path
) -> None:
    """What the trainer's own model computes, and PEFT's with the adapters alone, is what the export computes."""
    run = four_bits / "whole" if name == "four_bits" else runs / name
    convert(run, tmp_path / "merged")
    merged = open_for_comparison(tmp_path / "merged")
    assert compare_models(open_for_comparison(run), merged).max_rel <= 1e-5
    export_adapter(run, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    with_adapter = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        found = with_adapter(input_ids=tokens).logits
        whole = merged(input_ids=tokens).logits
    assert found.shape == whole.shape
    if name != "four_bits":  # there the base was another one
        assert (found - whole).abs().max() <= 1e-5 * whole.abs().max()
    if name == "four_bits":
        settings = load_training_job(run / "config.yaml", [f"run.folder={run}", "run.autoresume=true"])
        trainer = build_trainer(settings)
        with torch.no_grad():
            adapted = trainer.state.model.eval().logits({"input_ids": tokens})
        trainer.close()
        assert (adapted - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_a_teacher_helps(config: Path, trained_folder: Path, calibration: torch.Tensor, tmp_path: Path) -> None:
    """The student comes nearer to its teacher than the next token alone would bring it."""
    losses = {}
    for name, change in {"plain": "distillation=null", "kl": f"distillation={{teacher: {trained_folder}}}"}.items():
        train(load_training_job(config, [f"run.folder={tmp_path}/{name}", change, "train.duration=60ba"]))
        convert(tmp_path / name, tmp_path / f"{name}-out")
        own, teacher = (load_model(path).eval() for path in (tmp_path / f"{name}-out", trained_folder))
        with torch.no_grad():
            logs = [model(input_ids=calibration).logits.log_softmax(-1) for model in (own, teacher)]
        losses[name] = torch.nn.functional.kl_div(*logs, reduction="batchmean", log_target=True).item()
    assert losses["kl"] < 0.2 * losses["plain"]


def test_microbatches_change_nothing(config: Path, trained_folder: Path, tmp_path: Path) -> None:
    changes = [*kinds(trained_folder)["teacher"].split(";"), "train.duration=3ba"]
    whole = plain_runs.run(config, f"run.folder={tmp_path}/a", *changes, "train.microbatch_size=8")
    pieces = plain_runs.run(config, f"run.folder={tmp_path}/b", *changes, "train.microbatch_size=1")
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["trainable={}"], "trainable.parameters is empty"),
        (["trainable={parameters: [layers.2]}"], "there is no part 'layers.2'"),
        (["trainable={parameters: [block.4]}"], "there is no part 'block.4': the model has 4 blocks"),
        (["trainable={parameters: [output]}"], "its embedding, too"),
        (["trainable={parameters: [last.1], later: {soon: [all]}}"], "'soon' is no point of a run"),
        (["trainable={parameters: [last.1], later: {2ba: [all], 0.5dur: [norms]}}"], "in the same unit"),
        (["trainable={parameters: [last.1]}", "lora={}"], "leave one out"),
        (["lora={rank: 0}"], "lora.rank is 0"),
        (["lora={targets: [mpl]}"], "'mpl' is unknown; did you mean 'mlp'"),
        (["lora={targets: []}"], "lora.targets is empty"),
        (["lora={quantize: int8}"], "lora.quantize 'int8' is unknown; valid: nf4"),
        (["lora={quantize: nf4}", "sharding={}"], "can't be sharded"),
        (["lora={}", "sharding={}", "model.dtype=bfloat16"], "shards hold one dtype"),
        (["lora={}", "l0_pruning={target: {layers: 2}}"], "leave out lora"),
        (["distillation={}"], "name distillation.teacher"),
        (["distillation={objectives: {lm: 1.0}}"], "needs no teacher"),
        (["distillation={objectives: {kll: 1.0}}"], "no objective 'kll'"),
        (["distillation={objectives: {kl: 0.0}}"], "need a positive weight"),
        (["distillation={temperature: 0}"], "temperature is 0"),
        (["distillation={teacher: TEACHER, blocks: [1]}"], "belongs to the objectives mse, cosine and local"),
        (["distillation={teacher: TEACHER, objectives: {mse: 1.0}, blocks: [9]}"], "names 9; the model has 4 blocks"),
        (["distillation={objectives: {mse: 1.0}}", "l0_pruning={target: {hidden: 16}}"], "gates of hidden dimensions"),
        (["distillation={teacher: TEACHER}", "block_replacement={length: 2}"], "leave out distillation"),
    ],
)
def test_mistakes_are_told_before_any_work(
    config: Path, trained_folder: Path, tmp_path: Path, changes: list[str], message: str
) -> None:
    named = [change.replace("TEACHER", str(trained_folder)) for change in changes]
    with pytest.raises(UserError, match=message):
        build_trainer(load_training_job(config, [f"run.folder={tmp_path}/run", *named]))
    assert not (tmp_path / "run").exists()


def test_another_kind_of_recovery_is_no_resumption(runs: Path, config: Path) -> None:
    for changes, message in (
        (["lora={rank: 4, dropout: 0.0}"], "lora.rank 8; the config asks for 4"),
        ([], "lora.rank 8; the config asks for None"),
    ):
        with pytest.raises(UserError, match=message):
            build_trainer(load_training_job(config, [f"run.folder={runs}/lora", "run.autoresume=true", *changes]))


def test_adapters_are_refused_where_there_are_none(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no adapters"):
        export_adapter(runs / "parts", tmp_path / "out")
