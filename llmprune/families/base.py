"""What llmprune needs to know of an architecture: the only place that knows any.

A ``Family`` is one declarative entry. It names the modules of a Hugging Face causal LM and gives each a ``Role``;
everything else (what an axis of a weight means, what a gate multiplies, what surgery cuts and folds) follows from the
role through the table ``AXES`` below.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from llmprune.errors import UserError


class Role(Enum):
    """What a module does for the residual stream."""

    EMBEDDING = "embedding"
    ATTENTION_NORM = "norm before the attention"
    QUERY = "query projection"
    KEY_VALUE = "key or value projection"
    HEAD_NORM = "norm of every query or key by itself"
    ATTENTION_OUT = "attention output projection"
    MLP_NORM = "norm before the MLP"
    MLP_IN = "MLP input projection"
    MLP_OUT = "MLP output projection"
    FINAL_NORM = "final norm"
    OUTPUT = "output layer"


# Norms of the residual stream.
NORMS = frozenset({Role.ATTENTION_NORM, Role.MLP_NORM, Role.FINAL_NORM})

# The roles of a block's two sub-layers; each reads the residual stream and adds to it.
SUBLAYERS: dict[str, frozenset[Role]] = {
    "attention": frozenset({Role.ATTENTION_NORM, Role.QUERY, Role.KEY_VALUE, Role.HEAD_NORM, Role.ATTENTION_OUT}),
    "mlp": frozenset({Role.MLP_NORM, Role.MLP_IN, Role.MLP_OUT}),
}


class Axis(NamedTuple):
    """One axis of a parameter.

    Attributes:
        dimension: what is cut along it: ``hidden``, ``query`` (query heads × head size), ``key_value`` (key/value
            groups × head size), ``channel``, or None (never cut).
        factor: which gate factor multiplies it: ``hidden``, ``attention`` or ``mlp`` (hidden × layer × sub-layer),
            ``query``, ``channel``, or None.
    """

    dimension: str | None
    factor: str | None = None


# The axes of each role's weight. A bias has the weight's first axis.
AXES: dict[Role, tuple[Axis, ...]] = {
    Role.EMBEDDING: (Axis(None), Axis("hidden", "hidden")),
    Role.ATTENTION_NORM: (Axis("hidden", "hidden"),),
    Role.QUERY: (Axis("query"), Axis("hidden")),
    Role.KEY_VALUE: (Axis("key_value"), Axis("hidden")),
    Role.HEAD_NORM: (Axis(None),),
    Role.ATTENTION_OUT: (Axis("hidden", "attention"), Axis("query", "query")),
    Role.MLP_NORM: (Axis("hidden", "hidden"),),
    Role.MLP_IN: (Axis("channel"), Axis("hidden")),
    Role.MLP_OUT: (Axis("hidden", "mlp"), Axis("channel", "channel")),
    Role.FINAL_NORM: (Axis("hidden", "hidden"),),
    Role.OUTPUT: (Axis(None), Axis("hidden")),
}


@dataclass(frozen=True)
class Shape:
    """The size of a decoder: what pruning changes, and the head size, which it keeps."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value group."""
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


class Parameter(NamedTuple):
    """A parameter of a model, as its family sees it. ``block`` is None outside the blocks."""

    role: Role
    block: int | None
    axes: tuple[Axis, ...]

    @property
    def sublayer(self) -> str | None:
        """``attention`` or ``mlp``; None outside the blocks."""
        return next((name for name, roles in SUBLAYERS.items() if self.role in roles), None)


@dataclass(frozen=True)
class RMSNorm:
    """How the family's RMS norms are spelt: ``y = x / sqrt(mean(x²) + eps) · weight``.

    Attributes:
        epsilon: the module's attribute that holds eps.
    """

    epsilon: str


@dataclass(frozen=True)
class Family:
    """One Hugging Face model family.

    Attributes:
        name: the family's name on the command line and in plans.
        description: one sentence for ``llmprune families``.
        model_types: the ``model_type`` values of its configs.
        outer: modules outside the blocks, by name.
        blocks: name of the module list that holds the blocks.
        block: modules inside a block, by name within it.
        norm: how its norms compute.
        fields: the config's field for each field of ``Shape``.
        per_block: config fields that list something for every block (of its attention).
    """

    name: str
    description: str
    model_types: tuple[str, ...]
    outer: Mapping[str, Role]
    blocks: str
    block: Mapping[str, Role]
    norm: RMSNorm
    fields: Mapping[str, str]
    per_block: tuple[str, ...] = ()

    def shape(self, config: PretrainedConfig) -> Shape:
        """The shape that ``config`` describes (defaults of older configs filled in)."""
        values: dict[str, Any] = {name: getattr(config, field, None) for name, field in self.fields.items()}
        values["kv_heads"] = values["kv_heads"] or values["heads"]
        values["head_dim"] = values["head_dim"] or values["hidden"] // values["heads"]
        return Shape(**values)

    def with_shape(self, config: PretrainedConfig, shape: Shape, blocks: Sequence[int]) -> PretrainedConfig:
        """A copy of ``config`` that describes ``shape``.

        Args:
            config: the source's.
            shape: the new one.
            blocks: the source's number of every block's attention, [shape.layers].
        """
        config = copy.deepcopy(config)
        for name, field in self.fields.items():
            setattr(config, field, getattr(shape, name))
        for field in self.per_block:
            if (values := getattr(config, field, None)) is not None:
                setattr(config, field, [values[block] for block in blocks])
        return config

    def matrices(self) -> Counter[Role]:
        """How many matrices of each role a block has."""
        return Counter(role for role in self.block.values() if len(AXES[role]) == 2)

    def tied(self, config: PretrainedConfig) -> bool:
        """Whether the output layer is the embedding."""
        return bool(config.tie_word_embeddings)

    def outer_name(self, role: Role) -> str:
        """The name of the one module outside the blocks that has ``role``."""
        return next(name for name, r in self.outer.items() if r is role)

    def modules(self, layers: int) -> Iterator[tuple[str, Role, int | None]]:
        """Every module that holds prunable parameters: (name, role, block or None)."""
        for name, role in self.outer.items():
            yield name, role, None
        for block in range(layers):
            for name, role in self.block.items():
                yield f"{self.blocks}.{block}.{name}", role, block

    def locate(self, name: str) -> Parameter:
        """The role, block and axes of the parameter called ``name``.

        Raises:
            UserError: the family has no such parameter (a checkpoint of another architecture).
        """
        module, _, kind = name.rpartition(".")
        block: int | None = None
        role = self.outer.get(module)
        if module.startswith(self.blocks + "."):
            number, _, inner = module[len(self.blocks) + 1 :].partition(".")
            role = self.block.get(inner)
            block = int(number) if number.isdigit() else None
        if role is None or kind not in ("weight", "bias"):
            raise UserError(f"'{name}' is no parameter of the family {self.name}: is this model's config right?")
        axes = AXES[role]
        return Parameter(role, block, axes if kind == "weight" else axes[:1])

    def scaled_axes(self, parameter: Parameter, tied: bool) -> tuple[str | None, ...]:
        """The factor that is folded into each axis on export.

        With tied embeddings the factor folded into the embedding already reaches the output layer, so the final norm
        stays as it is.
        """
        if tied and parameter.role is Role.FINAL_NORM:
            return tuple(None for _ in parameter.axes)
        return tuple(axis.factor for axis in parameter.axes)


def target_shape(source: Shape, target: Mapping[str, int | None]) -> Shape:
    """The shape that ``target`` asks for; what it leaves out stays as in ``source``.

    If heads are given and key/value heads are not, whole key/value groups go, so that the queries per group stay; the
    same holds the other way round.

    Args:
        source: shape of the model to prune.
        target: any of ``layers``, ``hidden``, ``heads``, ``kv_heads``, ``intermediate``.

    Raises:
        UserError: larger than the source, not positive, or heads that can't be grouped evenly.
    """
    given = {name: value for name, value in target.items() if value is not None}
    if not given:
        raise UserError(f"the target shape is empty: name at least one of {', '.join(sorted(target))}")
    for name, value in given.items():
        limit = getattr(source, name)
        if value < 1 or value > limit:
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


def shape_from(values: Mapping[str, int]) -> Shape:
    """A ``Shape`` from plain numbers, as read from JSON.

    Raises:
        UserError: a field is missing, unknown or not a positive whole number.
    """
    names = {field.name for field in fields(Shape)}
    if set(values) != names or not all(
        isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values.values()
    ):
        raise UserError(f"a shape needs positive whole numbers for {', '.join(sorted(names))}; got {dict(values)}")
    shape = Shape(**values)
    if shape.heads % shape.kv_heads:
        raise UserError(f"a shape's heads must be a multiple of its kv_heads; got {shape.heads} and {shape.kv_heads}")
    return shape
