"""Roles of a Transformer's modules, and the axes of their weights."""

from enum import Enum
from typing import NamedTuple


class Role(Enum):
    """The role of a module with respect to the residual stream."""

    EMBEDDING = "embedding"
    POSITIONS = "embedding of learned positions"
    ATTENTION_NORM = "norm before the attention"
    QUERY = "query projection"
    KEY_VALUE = "key or value projection"
    QUERY_KEY_VALUE = "queries, keys and values, one after the other"
    HEADS_QUERY_KEY_VALUE = "each head's query, key and value, head by head"
    HEAD_NORM = "norm of every query or key by itself"
    QUERY_NORM = "norm over the queries of all heads"
    KEY_NORM = "norm over the keys of all groups"
    SHARED_RICHER_HEADS = "one non-linear layer for every head's output"
    RICHER_HEADS = "a non-linear layer for each head's output, one after the other"
    ATTENTION_OUT = "attention output projection"
    ATTENTION_OUT_TO_NORM = "attention output projection before a norm"
    ATTENTION_POST_NORM = "norm of the attention's output"
    MLP_NORM = "norm before the MLP"
    MLP_IN = "MLP input projection"
    MLP_GATE_UP = "both MLP input projections, one after the other"
    ROUTER = "router of the experts"
    MLP_OUT = "MLP output projection"
    MLP_OUT_TO_NORM = "MLP output projection before a norm"
    MLP_POST_NORM = "norm of the MLP's output"
    FINAL_NORM = "final norm"
    OUTPUT = "output layer"


NORMS = frozenset(role for role in Role if role.name.endswith("_NORM") and not role.name.endswith("_TO_NORM"))
EMBEDDINGS = frozenset({Role.EMBEDDING, Role.POSITIONS})
OUTPUTS = frozenset(  # output projections of sub-layers
    {Role.ATTENTION_OUT, Role.ATTENTION_OUT_TO_NORM, Role.MLP_OUT, Role.MLP_OUT_TO_NORM}
)

# The roles of a block's two sub-layers; each reads the residual stream and adds to it.
SUBLAYERS: dict[str, frozenset[Role]] = {
    "attention": frozenset(
        {
            Role.ATTENTION_NORM,
            Role.QUERY,
            Role.KEY_VALUE,
            Role.QUERY_KEY_VALUE,
            Role.HEADS_QUERY_KEY_VALUE,
            Role.HEAD_NORM,
            Role.QUERY_NORM,
            Role.KEY_NORM,
            Role.SHARED_RICHER_HEADS,
            Role.RICHER_HEADS,
            Role.ATTENTION_OUT,
            Role.ATTENTION_OUT_TO_NORM,
            Role.ATTENTION_POST_NORM,
        }
    ),
    "mlp": frozenset(
        {
            Role.MLP_NORM,
            Role.MLP_IN,
            Role.MLP_GATE_UP,
            Role.ROUTER,
            Role.MLP_OUT,
            Role.MLP_OUT_TO_NORM,
            Role.MLP_POST_NORM,
        }
    ),
}


class Axis(NamedTuple):
    """One axis of a parameter.

    Attributes:
        dimensions: dimensions that are cut along the axis, one after the other: ``hidden``, ``query`` (query heads),
            ``key_value`` (key/value groups), ``channel``, ``expert``, ``token``; empty = never cut.
        factor: name of the gate factor that multiplies the axis: ``hidden``, ``attention`` or ``mlp`` (hidden × layer ×
            sub-layer), ``query``, ``channel``, or None.
        repeat: number of times that each unit takes its size in ``Shape.units``.
    """

    dimensions: tuple[str, ...] = ()
    factor: str | None = None
    repeat: int = 1


_HIDDEN = Axis(("hidden",))
_GATED_HIDDEN = Axis(("hidden",), "hidden")

# The axes of each role's weight. A bias has the weight's first axis.
AXES: dict[Role, tuple[Axis, ...]] = {
    Role.EMBEDDING: (Axis(("token",)), _GATED_HIDDEN),
    Role.POSITIONS: (Axis(), _GATED_HIDDEN),
    Role.ATTENTION_NORM: (_GATED_HIDDEN,),
    Role.QUERY: (Axis(("query",)), _HIDDEN),
    Role.KEY_VALUE: (Axis(("key_value",)), _HIDDEN),
    Role.QUERY_KEY_VALUE: (Axis(("query", "key_value", "key_value")), _HIDDEN),
    Role.HEADS_QUERY_KEY_VALUE: (Axis(("query",), repeat=3), _HIDDEN),
    Role.HEAD_NORM: (Axis(),),
    Role.QUERY_NORM: (Axis(("query",)),),
    Role.KEY_NORM: (Axis(("key_value",)),),
    Role.SHARED_RICHER_HEADS: (Axis(), Axis()),
    Role.RICHER_HEADS: (Axis(("query",)), Axis()),
    Role.ATTENTION_OUT: (Axis(("hidden",), "attention"), Axis(("query",), "query")),
    # The norm after it takes statistics over the kept dimensions, so the removed dimensions must be zero.
    Role.ATTENTION_OUT_TO_NORM: (_GATED_HIDDEN, Axis(("query",), "query")),
    Role.ATTENTION_POST_NORM: (Axis(("hidden",), "attention"),),
    Role.MLP_NORM: (_GATED_HIDDEN,),
    Role.MLP_IN: (Axis(("channel",)), _HIDDEN),
    Role.MLP_GATE_UP: (Axis(("channel", "channel")), _HIDDEN),
    Role.ROUTER: (Axis(("expert",)), _HIDDEN),
    Role.MLP_OUT: (Axis(("hidden",), "mlp"), Axis(("channel",), "channel")),
    Role.MLP_OUT_TO_NORM: (_GATED_HIDDEN, Axis(("channel",), "channel")),
    Role.MLP_POST_NORM: (Axis(("hidden",), "mlp"),),
    Role.FINAL_NORM: (_GATED_HIDDEN,),
    Role.OUTPUT: (Axis(("token",)), _HIDDEN),
}

# The roles of a block's matrices between the residual stream and its heads, channels or experts.
MATRICES = frozenset(
    role
    for roles in SUBLAYERS.values()
    for role in roles
    if len(AXES[role]) == 2 and any(axis.dimensions == ("hidden",) for axis in AXES[role])
)
