"""The jobs that a YAML can name with its key ``job``, as one table of their schemas and functions."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmprune.config.schema import Config, IterationConfig, ScoringConfig, SearchConfig
from llmprune.utils.registry import Registry


@dataclass(frozen=True)
class Job:
    """A kind of job.

    Attributes:
        about: description of the job in one sentence.
        schema: dataclass of the job's YAML.
        function: function that runs the job, as ``package.module:name``; its argument is the config.
        needs: name of a section that this job must have; None = no such section.
        goes_on: whether a stopped job can resume because it saves its progress.
    """

    about: str
    schema: type[Any]
    function: str
    needs: str | None = None
    goes_on: bool = True

    def run(self, config: Any) -> None:
        """Run the job with its config."""
        module, _, name = self.function.partition(":")
        function: Callable[[Any], object] = getattr(importlib.import_module(module), name)
        function(config)


JOBS: Registry[Job] = Registry("jobs", "job")

_TRAIN = "llmprune.jobs.train:train"
for _name, _job in {
    "train": Job("Train, with whatever the sections add.", Config, _TRAIN),
    "prune": Job("Prune by learned gates.", Config, _TRAIN, needs="l0_pruning"),
    "replace": Job("Replace a span of blocks.", Config, _TRAIN, needs="block_replacement"),
    "score": Job("Score a model, and plan.", ScoringConfig, "llmprune.jobs.score:run_scoring", goes_on=False),
    "iterate": Job("Prune in rounds, and recover after each.", IterationConfig, "llmprune.jobs.iterate:iterate"),
    "search": Job("Look for the best way to prune under a budget.", SearchConfig, "llmprune.jobs.search:search"),
}.items():
    JOBS.register(_name)(_job)
