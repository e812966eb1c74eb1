"""Every job that trains, with matrix products in bfloat16: what GPUs compute, on a CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmprune.config.job_files import load_training_job
from llmprune.conversion.commands import convert
from llmprune.conversion.verify import compare_models, open_for_comparison
from llmprune.jobs.train import train
from llmprune.models.causal_lm import ComposerCausalLM
from llmprune.models.loading import load_model
from llmprune.training.trainer import build_trainer
from llmprune.utils.errors import UserError
from tests.conftest import random_model, tiny_config

TARGET = "l0_pruning={target: {layers: 3, hidden: 24, heads: 4, intermediate: 32}, lagrangian_warmup: 2ba}"
SIZE = "l0_pruning={target_sparsity: 0.3, lagrangian_warmup: 2ba}"
REPLACE = "block_replacement={start: 1, length: 2, objectives: %s}"
JOBS: dict[str, list[str]] = {
    "plain": [],
    "checkpointed": ["train.activation_checkpointing=true"],
    "gates to a shape": [TARGET],
    "gates to a size": [SIZE],
    "gates that learn from themselves": [TARGET, "distillation={}"],
    "gates that learn from themselves, checkpointed": [
        TARGET,
        "distillation={}",
        "train.activation_checkpointing=true",
    ],
    "distillation": ["distillation={teacher: MODEL, objectives: {kl: 1.0, lm: 0.5}}"],
    "distillation of states": ["distillation={teacher: MODEL, objectives: {kl: 1.0, mse: 0.5, cosine: 0.5}}"],
    "parts": ["trainable={parameters: [final_norm, last.1]}"],
    "adapters": ["lora={}"],
    "replacement by states": [REPLACE % "{mse: 1.0, cosine: 1.0}"],
    "replacement by predictions": [REPLACE % "{kl: 1.0, lm: 1.0}"],
    "replacement with others beside": [
        "block_replacement={start: 1, length: 2, objectives: {mse: 1.0, lm: 1.0}, also: [block.3]}"
    ],
}


class Products(TorchDispatchMode):
    """Notes the matrix products that are not in bfloat16; products with vectors, as gates have them, aside."""

    def __init__(self) -> None:
        super().__init__()
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm", "linear") or "scaled_dot_product" in name:
            tensors = [a for a in args[:3] if isinstance(a, Tensor) and a.ndim > 1]
            if not any(1 in t.shape for t in tensors) and any(t.dtype is not torch.bfloat16 for t in tensors):
                self.others.append(f"{name} {[(t.dtype, tuple(t.shape)) for t in tensors]}")
        return func(*args, **(kwargs or {}))


class Gradients(Callback):
    """Notes the parameters that train and got no gradient."""

    def __init__(self) -> None:
        self.missing: set[str] = set()
        self.batches = 0

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self.batches += 1
        self.missing |= {n for n, p in state.model.named_parameters() if p.requires_grad and p.grad is None}


@pytest.fixture
def yaml(data: Path, trained_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(f"""
run: {{name: test, folder: {tmp_path}/run, seed: 3}}
model: {{path: {trained_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
optimizer: {{lr: 1.0e-3}}
train: {{duration: 2ba, global_batch_size: 4, microbatch_size: 2, eval_interval: 0ba, precision: amp_bf16}}
loggers: {{console: false}}
""")
    return path


@pytest.mark.parametrize("settings", JOBS.values(), ids=JOBS)
def test_every_job(settings: list[str], yaml: Path, trained_folder: Path, tmp_path: Path) -> None:
    settings = [one.replace("MODEL", str(trained_folder)) for one in settings]
    trainer = build_trainer(load_training_job(yaml, settings))
    gradients = Gradients()
    trainer.state.callbacks.insert(0, gradients)
    with Products() as products:
        trainer.fit()
    trainer.close()
    assert gradients.batches == 2 and not gradients.missing
    assert not products.others
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/train/total"] for line in lines if "loss/train/total" in line]
    assert len(losses) == 2
    assert all(torch.tensor(loss).bfloat16().item() != loss for loss in losses)  # eight bits would be too few


def test_losses_are_near_those_in_float32(yaml: Path) -> None:
    model = random_model(tiny_config())
    batch = {"input_ids": torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(0))}
    exact, rounded = ComposerCausalLM(model), ComposerCausalLM(model, products=torch.bfloat16)
    with torch.no_grad():
        for of in (lambda m: m(batch), lambda m: m.eval_forward(batch)["loss"].sum() / 124, lambda m: m.logits(batch)):
            torch.testing.assert_close(of(rounded), of(exact), rtol=3e-2, atol=3e-1)
            assert of(rounded).dtype == torch.float32
            assert not torch.equal(of(rounded), of(exact))


def test_gated_is_cut_within_rounding(yaml: Path, tmp_path: Path) -> None:
    train(load_training_job(yaml, [TARGET, "train.duration=4ba"]))
    convert(tmp_path / "run", tmp_path / "cut")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compare_models(open_for_comparison(tmp_path / "run"), load_model(tmp_path / "cut")).max_rel < 2e-2


def test_half_precision_is_refused(yaml: Path) -> None:
    with pytest.raises(UserError, match="train.precision 'amp_fp16' is unknown; valid: auto, fp32, amp_bf16"):
        build_trainer(load_training_job(yaml, ["train.precision=amp_fp16"]))
