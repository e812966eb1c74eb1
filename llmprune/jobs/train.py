"""The job that trains: pruning by gates, replacing blocks, recovery, or plain training."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from composer import Callback, Trainer
from composer.utils import dist
from omegaconf import OmegaConf

from llmprune.checkpoints.checkpoint_folder import CheckpointFolder
from llmprune.checkpoints.metrics import read_metrics
from llmprune.checkpoints.run_folder import RunFolder
from llmprune.config.schema import Config
from llmprune.data.weight_updates import DynamicLoadingConfig
from llmprune.reporting.collect import ReportedRun
from llmprune.reporting.figures import draw_domain_weights
from llmprune.training.checks import trains
from llmprune.training.section import Inputs
from llmprune.training.trainer import build_trainer, checkpoint_uploading_of, no_needless_warnings, prepare_job
from llmprune.utils.errors import UserError
from llmprune.utils.processes import Preempted
from llmprune.utils.ranks import on_rank_zero


def train(config: Config, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Run the job that ``config`` describes to its end; a run that is complete already is not changed.

    No other process may use the run's folder at the same time.

    Args:
        config: config of the job.
        callbacks: further Composer callbacks, placed after llmprune's own.
    """
    inputs = prepare_job(config)
    with RunFolder(Path(config.run.folder)).claimed():
        return _train(config, inputs, callbacks)


def _train(config: Config, inputs: Inputs, callbacks: Sequence[Callback]) -> Trainer:
    trainer = build_trainer(config, inputs, callbacks)
    if config.train.eval_first and trainer.state.timestamp.batch.value == 0:
        trainer.eval()
    assert trainer.state.max_duration is not None
    if not trains(inputs):
        trainer.eval()
        if not math.isfinite(loss := float(trainer.state.eval_metric_values["loss"])):
            raise UserError(f"the held-out loss is {loss} with what was computed, so no checkpoint is written")
        if dist.get_global_rank() == 0:
            CheckpointFolder(RunFolder(Path(config.run.folder)).checkpoints).note_writing(0)
        trainer.save_checkpoint(f"{config.run.folder}/checkpoints/ba0-rank{{rank}}.pt")
        finish(trainer)
    elif trainer.state.timestamp < trainer.state.max_duration:
        try:
            with no_needless_warnings():
                trainer.fit()
        except Preempted:
            trainer.close()
            raise
        except UserError:
            trainer.engine.close()  # ends the background work; trainer.close() would wait for other ranks
            raise
    else:
        print(f"{config.run.folder} is complete: nothing is left to do until train.duration is raised")
        finish(trainer)
    folder = RunFolder(Path(config.run.folder))
    written = [section.ended(trainer, folder) for section in inputs.sections]
    if any(written):
        checkpoint_uploading_of(trainer).copy_rest()
    trainer.close()
    if config.section(DynamicLoadingConfig) is not None:
        on_rank_zero(lambda: draw_weights(RunFolder(Path(config.run.folder))))
    return trainer


def finish(trainer: Trainer) -> None:
    """Complete the newest checkpoint of a run that does not train."""
    checkpoint_uploading_of(trainer).finish(trainer.state.timestamp.batch.value)


def draw_weights(run: RunFolder) -> None:
    """Draw the weights of domains over the run, as weights.png and weights.csv in the run folder."""
    metrics = read_metrics(run.metrics)
    if any(name.startswith("mixing/weight/") for line in metrics for name in line):
        found = ReportedRun(run.path.name, run.path, OmegaConf.to_container(OmegaConf.load(run.config)), metrics)  # type: ignore[arg-type]
        replace(draw_domain_weights(found), name="weights").save(run.path)
