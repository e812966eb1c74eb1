"""The steps that train: the YAML of each job, its memory and its length, and the run."""

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from omegaconf import OmegaConf
from transformers import PretrainedConfig

from llmprune.config.job_files import load_training_job
from llmprune.conversion.commands import convert
from llmprune.jobs.prune.recipe import (
    BATCHES,
    MICROBATCHES,
    DataSize,
    batch_samples,
    fitted,
    training_job,
    write_job,
)
from llmprune.jobs.prune.steps import Steps
from llmprune.jobs.stages import asked_to_end
from llmprune.jobs.train import train
from llmprune.measurement.monitor import return_memory
from llmprune.models.loading import load_model_config
from llmprune.models.stored_weights import StoredWeights
from llmprune.utils.files import temporary_for
from llmprune.utils.logs import tell
from llmprune.utils.outputs import remove
from llmprune.utils.processes import TERMINATION
from llmprune.utils.ranks import on_rank_zero

PACE = 4  # batches that are timed
PACED = BATCHES * MICROBATCHES[0]  # samples with which a job has batches large enough for every size of microbatch
EVALUATIONS = 2  # of a training: before and after
FORWARD_SHARE = 1 / 3  # of the time of a token in training that its evaluation takes
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by their names in safetensors


@dataclass(frozen=True)
class Training:
    """A job that trains a model in a folder of its own.

    Attributes:
        name: name of the run, of its folder and of its YAML.
        about: first line of the YAML.
        model: folder or hub name of the model that trains.
        data: prepared data.
        size: size of the training data.
        seed: seed of the order of the data.
        sections: sections of the YAML beside those of every training.
        result: folder of the model that comes out.
        kind: kind of job.
    """

    name: str
    about: str
    model: str
    data: str
    size: DataSize
    seed: int
    sections: Mapping[str, Any]
    result: Path
    kind: str = "train"

    def run(self, steps: Steps, out: Path, *, tokens: float | None, minutes: float) -> None:
        """Write ``out``/NAME.yaml, train in ``out``/NAME, and convert the result; on all ranks.

        Args:
            steps: steps of the command.
            out: folder of the command.
            tokens: number of tokens; None = as many as the minutes hold.
            minutes: minutes of training, if ``tokens`` is None.
        """
        path, run = out / f"{self.name}.yaml", out / self.name
        steps.together(f"{self.name}: length and memory", path, lambda: self._plan(out, path, tokens, minutes))

        def work() -> None:
            with TERMINATION.noted():  # the run saves a checkpoint and ends by itself
                train(load_training_job(path))  # a complete run is not changed
            if TERMINATION.asked:  # in the last batch: the run is complete and this command is not
                raise asked_to_end()
            on_rank_zero(lambda: convert(run, self.result, dtype=weights_dtype(self.model)) and None)

        steps.together(self.name, self.result, work)

    def _plan(self, out: Path, path: Path, tokens: float | None, minutes: float) -> None:
        """Write the YAML, for a length that the tokens or the minutes give."""
        model = load_model_config(self.model)
        if tokens is None:
            pace = out / "pace.yaml"
            self._write(pace, out / "pace", PACED * dist.get_world_size() * self.size.length, model)
            speed = self._speed(pace, minutes)
            tokens = tokens_in(minutes, speed, self.size)
            return_memory()
            for made in (out / "pace", pace):
                on_rank_zero(lambda place=made: remove(place))  # type: ignore[misc]
            line = f"prune:   {speed:,.0f} tokens/s, so {tokens:,.0f} tokens in {minutes:g} minutes"
            on_rank_zero(lambda: tell(line))
        temporary, wanted = temporary_for(path), tokens
        self._write(temporary, out / self.name, wanted, model, path)
        on_rank_zero(lambda: temporary.rename(path) and None)

    def _write(
        self, path: Path, folder: Path, tokens: float, model: PretrainedConfig, final: Path | None = None
    ) -> None:
        """Write the YAML with the settings by which the job fits into memory; ``final`` is its later name."""

        def write() -> None:
            job = {
                **training_job(
                    self.model,
                    self.data,
                    folder,
                    tokens=round(tokens),
                    size=self.size,
                    seed=self.seed,
                    sections=self.sections,
                ),
                "job": self.kind,
            }
            write_job(path, job, self.about)
            given = fitted(path, model, self.size.length)
            changed = OmegaConf.merge(OmegaConf.create(job), OmegaConf.from_dotlist(given))
            write_job(path, OmegaConf.to_container(changed), self.about, named=final)  # type: ignore[arg-type]

        on_rank_zero(write)

    def _speed(self, path: Path, minutes: float) -> float:
        """The tokens per second of all ranks."""
        samples = int(load_training_job(path).train.microbatch_size) * dist.get_world_size()
        times = Times()
        given = [f"train.duration={PACE}ba", f"train.global_batch_size={samples}", "train.eval_interval=0ba"]
        given += ["train.eval_first=false", "checkpoint.interval=1000ba", "run.autoresume=false", "run.overwrite=true"]
        train(load_training_job(path, [*given, f"loggers.console_interval={PACE}ba"]), [times])
        return on_rank_zero(lambda: speed_of(times, samples, self.size, minutes))


def speed_of(times: "Times", samples: int, size: DataSize, minutes: float) -> float:
    """The tokens per second with the batches of a training of some minutes.

    Args:
        times: seconds of batches of one microbatch; the first one, which takes longer, does not count.
        samples: samples of these batches.
        size: size of the training data.
        minutes: minutes of the training.
    """
    step, work = (statistics.median(seconds[1:]) for seconds in (times.steps, times.microbatches))
    speed = samples * size.length / step
    for _ in range(3):  # the batch follows from the tokens, and the optimiser steps once for each batch
        microbatches = max(batch_samples(60 * minutes * speed, size) / samples, 1)
        speed = microbatches * samples * size.length / (microbatches * work + step - work)
    return speed


def tokens_in(minutes: float, speed: float, size: DataSize) -> float:
    """The tokens that a training of some minutes reads, with its evaluations; they take half of the time at most.

    Args:
        minutes: minutes of the training and its evaluations.
        speed: tokens per second of the training.
        size: size of the data.
    """
    whole = 60 * minutes * speed
    return whole - min(EVALUATIONS * size.evaluated * size.length * FORWARD_SHARE, whole / 2)


def weights_dtype(model: str) -> torch.dtype | None:
    """The dtype of most of the weights that a model's files hold; None = another one than float ones."""
    ((name, _),) = Counter(StoredWeights(model).dtypes().values()).most_common(1)
    return _DTYPES.get(name)


class Times(Callback):
    """The seconds of batches of one microbatch.

    Attributes:
        steps: seconds of the batches.
        microbatches: seconds of their forward and backward passes.
    """

    def __init__(self, steps: Sequence[float] = (), microbatches: Sequence[float] = ()) -> None:
        """Start with the given seconds."""
        self.steps, self.microbatches = [*steps], [*microbatches]
        self._start = 0.0

    def batch_start(self, state: State, logger: Logger) -> None:
        """Note the time."""
        self._start = time.perf_counter()

    def after_backward(self, state: State, logger: Logger) -> None:
        """Note the seconds of the forward and backward pass."""
        self.microbatches.append(time.perf_counter() - self._start)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Note the seconds of the batch."""
        self.steps.append(time.perf_counter() - self._start)
