"""What gates multiply, and on which axis."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor


@dataclasses.dataclass
class Factors:
    """The factors of a model's gates, float32; None = no factor.

    Attributes:
        hidden: factors of the embedding's output and of every norm's weight, [hidden].
        attention: factors of every attention's contribution to the residual stream, [blocks, hidden].
        mlp: factors of every MLP's contribution to the residual stream, [blocks, hidden].
        query: factors of the columns of the attention output, [blocks, heads · head size].
        channel: factors of the columns of the MLP output, [blocks, intermediate].
        kept: masks by dimension (``hidden`` [hidden], ``query`` [blocks, heads · head size], ``key_value`` [blocks,
            groups · head size]): 1 for places that stay, else 0; norms compute their statistics over places that stay.
    """

    hidden: Tensor | None = None
    attention: Tensor | None = None
    mlp: Tensor | None = None
    query: Tensor | None = None
    channel: Tensor | None = None
    kept: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        *,
        hidden: Tensor | None,
        attention: Tensor | None,
        mlp: Tensor | None,
        heads: Tensor | None,
        channel: Tensor | None,
        kv_heads: int,
        head_dim: int,
    ) -> "Factors":
        """The factors from gates of heads, ``heads`` [blocks, heads], with the masks that norms need."""
        kept = {} if hidden is None else {"hidden": _nonzero(hidden)}
        query = None
        if heads is not None:
            query = heads.repeat_interleave(head_dim, dim=1)
            groups = heads.unflatten(1, (kv_heads, -1)).amax(2).repeat_interleave(head_dim, dim=1)
            kept |= {"query": _nonzero(query), "key_value": _nonzero(groups)}
        return cls(hidden=hidden, attention=attention, mlp=mlp, query=query, channel=channel, kept=kept)

    def trainable(self) -> dict[str, Tensor]:
        """The factors that receive gradients, by name."""
        names = ("hidden", "attention", "mlp", "query", "channel")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def detached(self) -> "Factors":
        """A copy whose factors are leaves that collect their own gradients."""
        leaves: dict[str, Any] = {
            name: value.detach().contiguous().requires_grad_() for name, value in self.trainable().items()
        }
        return dataclasses.replace(self, **leaves)


def _nonzero(factor: Tensor) -> Tensor:
    return (factor.detach() != 0).to(factor.dtype)
