"""What a training job's config leaves open: the learning rate and the batch, which the model and the data decide."""

import itertools
import math

from llmprune.config.schema import Config

# Learning rates of continued pretraining by the number of parameters; docs/your_model.md has the sources.
LEARNING_RATES = {1e8: 3e-4, 1e9: 1e-4, 7e9: 5e-5, 7e10: 2e-5}


def learning_rate(parameters: float) -> float:
    """The learning rate for a model of this size, with two significant digits.

    Between the sizes of ``LEARNING_RATES`` the logarithms are interpolated; outside, the nearest one holds.

    >>> learning_rate(134e6), learning_rate(7e9)
    (0.00026, 5e-05)
    """
    sizes = list(LEARNING_RATES)
    if parameters <= sizes[0]:
        return LEARNING_RATES[sizes[0]]
    for low, high in itertools.pairwise(sizes):
        if parameters <= high:
            share = math.log(parameters / low) / math.log(high / low)
            ratio = LEARNING_RATES[high] / LEARNING_RATES[low]
            return float(f"{LEARNING_RATES[low] * ratio**share:.1e}")
    return LEARNING_RATES[sizes[-1]]


def fill_in(config: Config, *, parameters: int, length: int, rate: float = 1.0) -> None:
    """Set the learning rate and the batch if the config leaves them open.

    Args:
        config: config of the job, which is changed.
        parameters: number of parameters of the model that trains.
        length: number of tokens of a sample.
        rate: factor of the learning rate by size, for what the job's sections train.
    """
    if config.optimizer.lr is None:
        config.optimizer.lr = float(f"{rate * learning_rate(parameters):.1e}")
    if config.train.global_batch_size is None:
        config.train.global_batch_size = max(1, config.train.global_batch_tokens // length)
