"""What the whole way decides for the user: the criteria, and the YAMLs of the jobs that it runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.utils import dist, get_device
from omegaconf import OmegaConf
from transformers import PretrainedConfig

from llmprune.config.job_files import load_training_job
from llmprune.config.schema import Config
from llmprune.data.calibration import LENGTH
from llmprune.data.format import EVAL, TRAIN
from llmprune.data.prepared import PreparedData
from llmprune.estimate.job import cluster_here, estimate
from llmprune.jobs.prune.settings import PruneConfig
from llmprune.models.families import family_of
from llmprune.models.least_squares import LEAST, samples_for
from llmprune.models.source import longest_input
from llmprune.pruning.selection.correction import most_inputs
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.utils.errors import UserError
from llmprune.utils.files import write_text

BATCHES = 128  # batches of recovery that are aimed at
SMALLEST_BATCH, LARGEST_BATCH = 2048, 2**20  # tokens
EVALUATED = 8  # held-out samples per domain, while training
SAMPLES, MOST_SAMPLES = 32, 256  # calibration samples, at least, and at most unless ``refit`` needs more
ENOUGH = 32  # calibration tokens for each input of a matrix that ``refit`` fits
MICROBATCHES = (8, 4, 2, 1)  # samples per forward pass, on a GPU; half of them on a CPU
FEW_WRITTEN, MOST_WRITTEN = 250_000, 1_000_000  # tokens that the model writes; more recovery reads them again
DEPTH_SHARE = 0.5  # of the blocks that would go alone, where width goes too
GATING = 0.3  # share of the tokens with which gates train


@dataclass(frozen=True)
class Way:
    """A way of pruning.

    Attributes:
        criterion: criterion of the blocks that go; None = all stay.
        unit_criterion: criterion of the heads, channels and hidden dimensions that go; None = all stay.
    """

    criterion: str | None
    unit_criterion: str | None

    @property
    def plan(self) -> PlanConfig:
        """The settings of the plan, without a shape."""
        return PlanConfig(criterion=self.criterion, unit_criterion=self.unit_criterion)


WAYS = {
    "depth": Way("block_influence", None),
    "width": Way(None, "unit_activation_l2"),
    "both": Way("block_influence", "unit_activation_l2"),
}


def ways_of(method: str) -> dict[str, Way]:
    """The ways of pruning that a method compares, by name."""
    return WAYS if method == "auto" else {method: WAYS[method]}


def criteria_of(method: str) -> list[str]:
    """The criteria that a method needs."""
    named = [name for way in ways_of(method).values() for name in (way.criterion, way.unit_criterion) if name]
    return list(dict.fromkeys(["block_influence", *named]))  # cheap, and records the calibration samples


def batch_tokens(tokens: float) -> int:
    """The tokens of a batch: a power of two with which ``tokens`` make about ``BATCHES`` batches.

    >>> batch_tokens(250_000), batch_tokens(1e6), batch_tokens(50e9)
    (2048, 8192, 1048576)
    """
    wanted = 2 ** round(math.log2(max(tokens / BATCHES, 1)))
    return min(max(wanted, SMALLEST_BATCH), LARGEST_BATCH)


@dataclass(frozen=True)
class DataSize:
    """The size of training data.

    Attributes:
        length: number of tokens of a sample.
        samples: number of samples.
        evaluated: number of held-out samples that an evaluation reads.
    """

    length: int
    samples: int
    evaluated: int = 0

    @classmethod
    def of(cls, data: PreparedData) -> "DataSize":
        """The size of all domains."""
        manifest = data.manifest
        return cls(
            manifest.sequence_length,
            sum(manifest.samples(domain, TRAIN) for domain in manifest.domains),
            sum(min(manifest.samples(domain, EVAL), EVALUATED) for domain in manifest.domains),
        )


def batch_samples(tokens: float, size: DataSize) -> int:
    """The samples of a batch: a multiple of the ranks, and not more than there are.

    Args:
        tokens: number of tokens of the whole training.
        size: size of the training data.
    """
    ranks = dist.get_world_size()
    wanted = -(-max(batch_tokens(tokens) // size.length, 1) // ranks) * ranks
    return max(min(wanted, size.samples // ranks * ranks), ranks)


def sample_length(config: PruneConfig, model: PretrainedConfig) -> int:
    """The number of tokens of the samples that are made from text."""
    return config.seq_len or min(LENGTH, longest_input(model) or LENGTH)


def written_tokens(config: PruneConfig) -> int:
    """The number of tokens that the model writes as its own training text."""
    return min(config.wanted_tokens() or FEW_WRITTEN, MOST_WRITTEN)


def write_job(path: Path, job: Mapping[str, Any], about: str, *, named: Path | None = None) -> None:
    """Write the YAML of a job, with a comment that says how to run it alone.

    Args:
        path: file to write.
        job: contents of the YAML.
        about: what the job does, as a sentence.
        named: later name of the file; None = ``path``.
    """
    head = (
        f"# {about}\n#   composer train.py {named or path} [key=value …]     several ranks: composer -n 8 train.py …\n"
    )
    write_text(path, head + OmegaConf.to_yaml(OmegaConf.create(dict(job))))


def calibration_samples(model: PretrainedConfig, length: int, available: int | None = None) -> int:
    """The number of calibration samples: as many as make ``refit`` good.

    Args:
        model: config of the source model.
        length: number of tokens of a sample.
        available: number of samples that there are; None = enough.
    """
    inputs = most_inputs(family_of(model).shape(model))
    least, enough = (samples_for(math.ceil(tokens * inputs / length)) for tokens in (LEAST, ENOUGH))
    wanted = max(SAMPLES, least, min(enough, MOST_SAMPLES))
    return wanted if available is None else min(wanted, available)


def scoring_job(model: str, data: str, criteria: list[str], folder: Path, *, samples: int, seed: int) -> dict[str, Any]:
    """The job that scores the source model."""
    return {
        "job": "score",
        "run": {"name": "scores", "folder": str(folder), "overwrite": True},
        "model": {"path": model},
        "layer_scoring": {"data": {"path": data, "samples": samples, "seed": seed}, "criteria": criteria, "seed": seed},
    }


def training_job(
    model: str, data: str, folder: Path, *, tokens: int, size: DataSize, seed: int, sections: Mapping[str, Any]
) -> dict[str, Any]:
    """A job that trains for a number of tokens.

    Args:
        model: folder or hub name of the model that trains.
        data: prepared data.
        folder: folder of the run.
        tokens: number of tokens.
        size: size of the training data; a batch has no more samples.
        seed: seed of the order of the data.
        sections: further sections of the YAML.
    """
    samples = batch_samples(tokens, size)
    batches = max(round(tokens / (samples * size.length)), 2)
    return {
        "job": "train",
        "run": {"name": folder.name, "folder": str(folder), "seed": seed, "autoresume": True},
        "model": {"path": model},
        "data": {"path": data, "eval_samples_per_domain": EVALUATED},
        "scheduler": {"name": "cosine", "warmup": "0.1dur", "final": 0.1},
        "train": {
            "duration": f"{batches}ba",
            "global_batch_size": samples,
            "eval_interval": "1dur",
            "eval_first": True,
        },
        "checkpoint": {"interval": "0.25dur", "keep": 1},
        "loggers": {"console_interval": f"{max(batches // 20, 1)}ba"},
        **sections,
    }


def learning_from(teacher: str | None) -> dict[str, Any]:
    """The section with which a model learns from a teacher's predictions and from the text; None = from itself."""
    return {"distillation": {"teacher": teacher, "objectives": {"kl": 1.0, "lm": 0.5}}}


def fitted(path: Path, model: PretrainedConfig, length: int) -> list[str]:
    """The overrides with which a job fits into the memory of this machine's ranks, from the fastest on.

    Args:
        path: YAML of the job.
        model: Hugging Face config of the model that trains.
        length: number of tokens of a sample.

    Raises:
        UserError: nothing makes it fit.
    """
    on_gpu, ranks = get_device(None).name == "gpu", dist.get_world_size()
    smallest: tuple[float, Config] | None = None
    for sharding in ([], ["sharding={}"])[: 1 + (ranks > 1)]:
        for checkpointing in (False, True):
            for micro in MICROBATCHES if on_gpu else MICROBATCHES[1:]:
                given = [f"train.microbatch_size={micro}", *sharding]
                given += ["train.activation_checkpointing=true"] if checkpointing else []
                config = load_training_job(path, given)
                if micro > 1 and micro * ranks > (config.train.global_batch_size or 1):
                    continue
                found = estimate(config, model, length, cluster_here(config))
                if found.fits:
                    return given
                if smallest is None or found.total < smallest[0]:
                    smallest = found.total, config
    assert smallest is not None
    raise UserError(
        f"recovery takes {smallest[0] / 1e9:.1f} GB on every rank at least, more than is free: take more ranks "
        f"(composer -n N …), or let adapters train with yamls/finetune.yaml"
    )
