"""Shapes: the sizes of a decoder that pruning changes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from llmprune.utils.errors import UserError, nearest

LARGEST = 2**20  # largest size in a file; far more than any model has
MOST = 2**26  # largest number of rows of all blocks' widest matrices together
PRUNED = ("layers", "hidden", "heads", "kv_heads", "intermediate", "experts", "vocabulary")
_OPTIONAL = ("experts", "vocabulary")


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder: those that pruning changes, and the head size, which stays the same.

    ``experts`` is None if a block has a single MLP. ``vocabulary``, the number of rows of the embedding, is None if the
    file that the shape is from does not say it.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    experts: int | None = None
    vocabulary: int | None = None

    @property
    def heads_per_group(self) -> int:
        """The number of query heads that share one key/value group."""
        return self.heads // self.kv_heads

    def agrees(self, other: "Shape") -> bool:
        """Whether two shapes are the same, as far as both record them: older files have no ``vocabulary``."""
        if self.vocabulary is None or other.vocabulary is None:
            return replace(self, vocabulary=None) == replace(other, vocabulary=None)
        return self == other

    def units(self, dimension: str) -> tuple[int, int]:
        """The number of units of a parameter's dimension (see ``Axis``), and the rows or columns of each unit."""
        return {
            "hidden": (self.hidden, 1),
            "query": (self.heads, self.head_dim),
            "key_value": (self.kv_heads, self.head_dim),
            "channel": (self.intermediate, 1),
            "expert": (self.experts or 1, 1),
            "token": (self.vocabulary or 0, 1),
        }[dimension]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items() if value is not None)


def target_shape(source: Shape, target: Mapping[str, int | None]) -> Shape:
    """The shape that ``target`` describes; sizes that it leaves out stay as in ``source``.

    If heads are given and key/value heads are not, whole key/value groups are removed, so that the number of queries
    per group stays; if only key/value heads are given, the same holds.

    Args:
        source: shape of the model to prune.
        target: sizes by name, any of ``layers``, ``hidden``, ``heads``, ``kv_heads``, ``intermediate``, ``experts``,
            ``vocabulary``.

    Raises:
        UserError: a size is unknown, larger than the source's or not positive, or heads can't be grouped evenly.
    """
    given = {name: value for name, value in target.items() if value is not None}
    if not given:
        raise UserError(f"the target shape is empty: name at least one of {', '.join(PRUNED)}")
    for name, value in given.items():
        if name not in PRUNED:
            raise UserError(f"a shape has no '{name}'; {nearest(name, PRUNED)}")
        limit = getattr(source, name)
        if limit is None:
            known = "this model has none" if name == "experts" else "the scores do not record the source's: score again"
            raise UserError(f"target {name}: {known}")
        if not isinstance(value, int) or value < 1 or value > limit:
            raise UserError(f"target {name} {value} must lie between 1 and the source's {limit}")
    per_group = source.heads_per_group
    if "heads" in given and "kv_heads" not in given:
        if given["heads"] % per_group:
            lower = given["heads"] // per_group * per_group
            choices = [n for n in (lower, lower + per_group) if 0 < n <= source.heads]
            raise UserError(
                f"target heads {given['heads']} is not a multiple of the source's {per_group} query heads per "
                f"key/value group: choose {' or '.join(map(str, choices))}, or give kv_heads as well to prune heads "
                "within groups"
            )
        given["kv_heads"] = given["heads"] // per_group
    elif "kv_heads" in given and "heads" not in given:
        given["heads"] = given["kv_heads"] * per_group
    shape = replace(source, **given)
    if shape.heads % shape.kv_heads:
        raise UserError(
            f"target heads {shape.heads} can't be divided evenly among {shape.kv_heads} key/value groups: "
            f"choose a multiple of {shape.kv_heads}"
        )
    if shape.heads_per_group > per_group:
        raise UserError(
            f"target heads {shape.heads} with kv_heads {shape.kv_heads} needs {shape.heads_per_group} query heads per "
            f"group, but the source has {per_group}: choose at most {per_group * shape.kv_heads} heads"
        )
    return shape


def shapes_between(source: Shape, target: Shape, rounds: int) -> list[Shape]:
    """The shapes after each of ``rounds`` rounds, ending in ``target``; every size shrinks by the same factor in each.

    The number of query heads per group shrinks by its own factor, so that every shape is possible.
    """

    def size(before: int, after: int, number: int) -> int:
        return round(before * (after / before) ** (number / rounds))

    found = []
    for number in range(1, rounds + 1):
        sizes = {
            name: size(getattr(source, name), getattr(target, name), number)
            for name in ("layers", "hidden", "kv_heads", "intermediate", *(["experts"] if source.experts else []))
        }
        per_group = size(source.heads_per_group, target.heads_per_group, number)
        found.append(replace(source, **sizes, heads=sizes["kv_heads"] * per_group))
    return found


def shape_from(values: Mapping[str, int | None]) -> Shape:
    """A ``Shape`` from plain numbers, as read from JSON.

    Raises:
        UserError: a field is missing, unknown, not a positive whole number, or beyond ``LARGEST``.
    """
    names = {field.name for field in fields(Shape)}
    given: dict[str, Any] = {
        name: value for name, value in values.items() if value is not None or name not in _OPTIONAL
    }
    if set(given) | {*_OPTIONAL} != names or not all(
        isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in given.values()
    ):
        raise UserError(f"a shape needs positive whole numbers for {', '.join(sorted(names))}; got {dict(values)}")
    shape = Shape(**given)
    widest = max(shape.hidden, shape.intermediate, shape.heads * shape.head_dim)
    largest = max(widest, shape.layers, shape.experts or 1, shape.vocabulary or 1)
    if largest > LARGEST or shape.layers * widest > MOST:
        raise UserError(f"no model has a shape such as {str(shape)[:200]}: the file is damaged")
    if shape.heads % shape.kv_heads:
        raise UserError(f"a shape's heads must be a multiple of its kv_heads; got {shape.heads} and {shape.kv_heads}")
    return shape
