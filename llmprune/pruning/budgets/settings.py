"""The settings of budgets: limits on the cost of the pruned model."""

from dataclasses import dataclass

from llmprune.utils.formats import Format
from llmprune.utils.settings import limited


@dataclass
class BudgetConfig:
    """Limits on the cost of the pruned model; the model must keep to every budget that is given.

    Attributes:
        params: budget of parameters: a share of the source model's, up to 1, or a number such as ``1.3B``; null = no
            limit.
        memory: budget of memory for weights and a full key/value cache: a size such as ``8GB``, or a share of the
            source model's; null = no limit.
        latency: budget of the time to compute one token after a full cache, measured on this machine, as a share of the
            source model's; null = no limit.
        context: number of tokens in the key/value cache; null = 2048, or the model's longest input if that is shorter.
        batch: number of sequences in the key/value cache.
        dtype: number format of the weights and the cache: float32, bfloat16 or float16; times are measured in float32
            where bfloat16 is slow.
        vocabulary: number of tokens that stay, those that the calibration text uses most; null = all.
        depth_share: how much of the saving whole blocks make, if width goes too: this share of the blocks that would go
            alone; null = as much as has the lowest loss before recovery.
        multiple: hidden dimensions and MLP channels are multiples of this number; null = a sixteenth of the source
            model's, as a power of two that divides them, at most 256.
        tries: number of shapes that are tried on the calibration samples (of each way, if several are compared).
    """

    params: str | None = None
    memory: str | None = None
    latency: str | None = None
    context: int | None = limited(None, least=1)
    batch: int = limited(1, least=1)
    dtype: Format = "bfloat16"
    vocabulary: int | None = limited(None, least=1)
    depth_share: float | None = limited(None, least=0, most=1)
    multiple: int | None = limited(None, least=1)
    tries: int = limited(48, least=1)
