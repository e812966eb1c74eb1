"""What moves to the device whole while a model is to be sharded: never the model."""

from pathlib import Path
from typing import Any

import pytest
from composer.devices import DeviceCPU
from torch import nn
from torch.distributed.tensor import DTensor

from llmprune.config.job_files import load_training_job
from llmprune.training.trainer import build_trainer

SECTIONS = {
    "plain": "scheduler.warmup=0ba",
    "lora": "lora={}",
    "blocks": "block_replacement={start: 2, length: 2}",
    "linear": "block_replacement={start: 2, length: 2, kind: linear, fit_samples: 8}",
    "gates": "l0_pruning={target: {layers: 3}}",
    "parts": "trainable={parameters: [final_norm]}",
    "teacher": "distillation={{teacher: {model}}}",
}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_sharded_model_never_moves_whole(
    section: str, data: Path, trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.yaml").write_text(f"""
run: {{name: test, folder: {tmp_path}/run, seed: 3}}
model: {{path: {trained_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
sharding: {{}}
train: {{duration: 2ba, global_batch_size: 2, microbatch_size: 2}}
""")
    moved: list[int] = []
    move = DeviceCPU.module_to_device

    def watched(device: DeviceCPU, module: nn.Module) -> Any:
        moved.append(sum(p.numel() for p in module.parameters() if not isinstance(p, DTensor)))
        return move(device, module)

    monkeypatch.setattr(DeviceCPU, "module_to_device", watched)
    overrides = [SECTIONS[section].format(model=trained_folder)] if section == "teacher" else [SECTIONS[section]]
    trainer = build_trainer(load_training_job(tmp_path / "job.yaml", overrides))
    parameters = [*trainer.state.model.parameters()]
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    assert max(moved, default=0) < sum(parameter.numel() for parameter in parameters) / 2
    trainer.close()
