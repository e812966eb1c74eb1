"""Baseline criteria, which read neither weights nor samples."""

import numpy as np

from llmprune.pruning.scoring.criterion import CRITERIA, Criterion


@CRITERIA.register("tail")
class Tail(Criterion):
    """The last blocks are removed first."""

    def result(self) -> list[float]:
        return [float(self.job.layers - block) for block in range(self.job.layers)]


@CRITERIA.register("random")
class Random(Criterion):
    """A seeded random order."""

    def result(self) -> list[float]:
        return np.random.default_rng(self.job.seed).random(self.job.layers).tolist()
