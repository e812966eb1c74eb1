"""The settings of budgets: what the model that a plan leaves may cost."""

from dataclasses import dataclass

from llmprune.utils.formats import Format
from llmprune.utils.settings import limited


@dataclass
class BudgetConfig:
    """What the model that a plan leaves may cost; every budget that is given must be kept.

    Attributes:
        params: parameters: a share of the source's up to 1, or a number such as ``1.3B``.
        memory: of weights and a full key/value cache, such as ``8GB``, or a share of the source's.
        latency: of a token after a cache, measured here: a share of the source's.
        context: tokens in the cache; null = 2048, or as many as the model takes.
        batch: sequences in the cache.
        dtype: of the weights and the cache: float32, bfloat16 or float16.
        multiple: what hidden dimensions and channels must be multiples of; null = a sixteenth of the source's, as a
            power of two that divides them, at most 256.
        tries: how many shapes are tried on the calibration samples.
    """

    params: str | None = None
    memory: str | None = None
    latency: str | None = None
    context: int | None = limited(None, least=1)
    batch: int = limited(1, least=1)
    dtype: Format = "bfloat16"
    multiple: int | None = limited(None, least=1)
    tries: int = limited(48, least=1)
