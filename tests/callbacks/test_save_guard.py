"""What is saved can be resumed from."""

import shutil
from pathlib import Path

import pytest
import torch
from composer.core import Callback, State
from composer.loggers import Logger

from llmprune.checkpoints.checkpoint_folder import CheckpointFolder
from llmprune.config.job_files import load_training_job
from llmprune.jobs.train import train
from llmprune.training.trainer import build_trainer
from llmprune.utils.errors import UserError


@pytest.fixture
def yaml(data: Path, model_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(f"""
run: {{name: test, folder: {tmp_path}/run, seed: 3}}
model: {{path: {model_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
optimizer: {{lr: 1.0e-3}}
train: {{duration: 4ba, global_batch_size: 4, microbatch_size: 2, eval_interval: 0ba}}
checkpoint: {{interval: 1ba}}
loggers: {{console: false}}
""")
    return path


class Explode(Callback):
    """Breaks a weight after some batch."""

    def __init__(self, batch: int, value: float) -> None:
        self.batch, self.value = batch, value

    def batch_end(self, state: State, logger: Logger) -> None:
        if state.timestamp.batch.value == self.batch:
            with torch.no_grad():
                next(state.model.parameters())[0, 0] = self.value


@pytest.mark.parametrize("duration", ["4ba", "1ba"])
def test_an_exploded_model_is_not_saved(yaml: Path, tmp_path: Path, duration: str) -> None:
    """The weights of such a step are finite, and still no number comes out of the model."""
    with pytest.raises(UserError, match="after batch 1, so no checkpoint is written"):
        train(load_training_job(yaml, ["optimizer.lr=1e20", f"train.duration={duration}"]))
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").by_age() == []
    train(load_training_job(yaml, ["run.autoresume=true", f"train.duration={duration}"]))
    assert CheckpointFolder(tmp_path / "run" / "checkpoints").latest() is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_checkpoint_before_stays_and_is_gone_on_with(yaml: Path, tmp_path: Path, value: float) -> None:
    trainer = build_trainer(load_training_job(yaml, ["checkpoint.keep=1"]))
    trainer.state.callbacks.insert(0, Explode(3, value))
    with pytest.raises(UserError, match=r"exploded \('model.embed_tokens.weight' .*after batch 3"):
        trainer.fit()
    trainer.engine.close()
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    latest = folder.latest(contents=True)
    assert latest is not None and latest.name == "ba2-rank0.pt"
    trainer = train(load_training_job(yaml, ["run.autoresume=true"]))
    assert trainer.state.timestamp.batch.value == 4


def test_the_look_before_saving_changes_nothing(yaml: Path, tmp_path: Path) -> None:
    """The same weights with a checkpoint after every batch as with one at the end."""
    states = []
    for interval in ("1ba", "4ba"):
        trainer = train(load_training_job(yaml, [f"checkpoint.interval={interval}", "lora={dropout: 0.1}"]))
        states.append({name: value.clone() for name, value in trainer.state.model.state_dict().items()})
        shutil.rmtree(tmp_path / "run")
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
