"""Multiply-accumulate operations of a forward pass, from the config alone.

Products that a causal or a sliding-window mask throws away are counted, since dense kernels compute them and counters
count them; a token after a cache that holds only a sliding window takes fewer. Norms, activations and rotations are
left out, as everywhere.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig

from llmprune.models.families import family_of, richer_heads_of
from llmprune.utils.errors import UserError


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulate operations; a FLOP count is twice that.

    Attributes:
        projections: of the attention's matrices, and of the layers of richer heads.
        attention: queries by keys, and weights by values.
        mlp: of the MLPs' matrices; of a mixture of experts, of those that a token goes through, and of the router.
        output: of the output layer.
    """

    projections: int
    attention: int
    mlp: int
    output: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.projections + self.attention + self.mlp + self.output


def macs(config: PretrainedConfig, tokens: int, past: int = 0, *, logits: int | None = None) -> Macs:
    """Count one sequence's forward pass.

    Args:
        config: of a supported family.
        tokens: that go through the model together.
        past: tokens in the cache.
        logits: tokens whose logits are computed; None = all.

    Raises:
        UserError: the architecture is not supported, or has a replacement module.
    """
    if getattr(config, "llmprune_replacement", None) is not None:
        raise UserError("what a replacement module for blocks takes is not counted")
    family = family_of(config)
    shape = family.shape(config)
    matrices = family.matrices(config)
    columns = matrices["query"] * shape.heads + matrices["key_value"] * shape.kv_heads
    richer = 0 if richer_heads_of(config) is None else shape.heads * shape.head_dim
    channels, router = matrices["channel"] * shape.intermediate, 0
    if shape.experts is not None and family.chosen_experts is not None:
        channels = channels // shape.experts * getattr(config, family.chosen_experts)
        router = matrices["expert"] * shape.experts
    return Macs(
        projections=tokens * shape.layers * shape.head_dim * (shape.hidden * columns + richer),
        attention=2 * tokens * (past + tokens) * shape.layers * shape.heads * shape.head_dim,
        mlp=tokens * shape.layers * shape.hidden * (channels + router),
        output=(tokens if logits is None else logits) * shape.hidden * config.vocab_size,
    )
