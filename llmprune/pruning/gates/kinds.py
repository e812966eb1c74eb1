"""The kinds of gates: what each removes, how many gates it has, and which kinds can be combined."""

from collections.abc import Collection

from llmprune.models.families import Shape
from llmprune.utils.errors import UserError, nearest

HIDDEN, KV_GROUP, HEAD, INTERMEDIATE = "hidden", "kv_group", "head", "intermediate"
LAYER, ATTENTION, MLP = "layer", "attention", "mlp"
WIDTH = (HIDDEN, KV_GROUP, HEAD, INTERMEDIATE)
DEPTH = (LAYER, ATTENTION, MLP)


def gate_sizes(source: Shape) -> dict[str, tuple[int, ...]]:
    """The size of every kind's tensor; gates are counted along the last dimension, the others are rows.

    ``kv_group`` removes a key/value group with all its queries (in models without grouped queries: a head); ``head``
    removes query heads within their group; ``layer`` a block; ``attention`` and ``mlp`` one of a block's sub-layers.
    """
    blocks = source.layers
    return {
        HIDDEN: (source.hidden,),
        KV_GROUP: (blocks, source.kv_heads),
        HEAD: (blocks, source.kv_heads, source.heads_per_group),
        INTERMEDIATE: (blocks, source.intermediate),
        LAYER: (blocks,),
        ATTENTION: (blocks,),
        MLP: (blocks,),
    }


def check_kinds(kinds: Collection[str]) -> None:
    """Check that these kinds of gates can be trained together.

    Raises:
        UserError: they can't be trained together; the message contains the reason.
    """
    known = (*WIDTH, *DEPTH)
    for kind in kinds:
        if kind not in known:
            raise UserError(f"there are no gates called '{kind}'; {nearest(kind, known)}")
    if not kinds:
        raise UserError(f"no gates: choose some of {', '.join(known)}")
    width, depth = [k for k in WIDTH if k in kinds], [k for k in DEPTH if k in kinds]
    if width and depth not in ([], [LAYER], [ATTENTION, MLP]):
        reason = (
            "layer gates remove both sub-layers of a block, so attention and mlp gates beside them learn the same "
            "decision twice"
            if LAYER in depth
            else f"{depth[0]} gates alone leave the other sub-layers no way to give up depth"
        )
        raise UserError(
            f"gates on {', '.join(width)} can't go with {', '.join(depth)}: {reason}; choose layer, or attention and "
            "mlp, or none of them"
        )
