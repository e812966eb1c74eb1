"""What llmprune needs to know of an architecture: the only place that knows any.

A ``Family`` is one declarative entry. It names the modules of a Hugging Face causal LM and gives each a ``Role``;
everything else (what an axis of a weight means, what a gate multiplies, what surgery cuts and folds) follows from the
role through the table ``AXES``.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PretrainedConfig

from llmprune.models.families.roles_and_axes import AXES, MATRICES, NORMS, SUBLAYERS, Axis, Role
from llmprune.models.families.shapes import Shape
from llmprune.utils.errors import UserError

_NUMBER = r"\.(\d+)\."  # of an expert, within a block


class Parameter(NamedTuple):
    """A parameter of a model, as its family sees it.

    Attributes:
        role: of its module.
        block: number of its block; None outside the blocks.
        axes: of the tensor.
        offset: what the model adds to the tensor before it uses it (norms that add one).
        expert: number of its expert; None outside the experts.
    """

    role: Role
    block: int | None
    axes: tuple[Axis, ...]
    offset: float = 0.0
    expert: int | None = None

    @property
    def sublayer(self) -> str | None:
        """``attention`` or ``mlp``; None outside the blocks."""
        return next((name for name, roles in SUBLAYERS.items() if self.role in roles), None)


@dataclass(frozen=True)
class Norm:
    """How the family's norms are spelt.

    An RMS norm computes ``x / sqrt(mean(x²) + eps) · (offset + weight)``; one that is ``centred`` (LayerNorm) takes the
    mean off first and adds a bias last.

    Attributes:
        epsilon: the module's attribute that holds eps.
        centred: whether it is a LayerNorm.
        offset: what is added to the weight.
    """

    epsilon: str
    centred: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class Family:
    """One Hugging Face model family.

    Attributes:
        name: the family's name on the command line and in plans.
        description: one sentence for ``llmprune families``.
        model_types: the ``model_type`` values of its configs.
        outer: modules outside the blocks, by name.
        blocks: name of the module list that holds the blocks.
        block: modules inside a block, by name within it; ``*`` stands for the number of an expert.
        norm: how its norms compute.
        fields: the config's field for each field of ``Shape``; without ``head_dim`` the config can't hold a head size,
            it is always hidden / heads.
        per_block: config fields that list something for every block (of its attention).
        aliases: further config fields that hold a field of ``Shape``.
        requires: config fields that must have this value.
        chosen_experts: the config's field with the number of experts that a token goes through.
        parallel: the config's field that says whether attention and MLP of a block read the same input.
        scaled_embedding: whether the model multiplies the embedding's output by the root of the hidden size.
        softcap: the config's field with the bound that the logits keep, if they do.
        whole_heads: whether hidden must be a multiple of heads, although the config names a head size: Transformers 5
            refuses other configs of such models.
        derived_head_size: whether this config takes hidden / heads for the head size though it has a field for it.
        refused_gates: kinds of gates that the family can't have, each with the reason.
        tuple_blocks: whether a block returns its output in a tuple.
        document_masks: whether attention is kept to documents by a mask; otherwise Transformers makes it from positions
            that begin anew.
        buffers: names within a block that old checkpoints store and no model reads.
    """

    name: str
    description: str
    model_types: tuple[str, ...]
    outer: Mapping[str, Role]
    blocks: str
    block: Mapping[str, Role]
    norm: Norm
    fields: Mapping[str, str]
    per_block: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    requires: Mapping[str, Any] = field(default_factory=dict)
    chosen_experts: str | None = None
    parallel: str | None = None
    scaled_embedding: bool = False
    softcap: str | None = None
    document_masks: bool = False
    whole_heads: bool = False
    derived_head_size: Callable[[PretrainedConfig], bool] = lambda _: False
    refused_gates: Mapping[str, str] = field(default_factory=dict)
    tuple_blocks: bool = False
    buffers: tuple[str, ...] = ()

    def check_config(self, config: PretrainedConfig) -> None:
        """Check that ``config`` is of a variant that this entry describes.

        Raises:
            UserError: it is not.
        """
        for name, wanted in self.requires.items():
            if (found := getattr(config, name, wanted)) != wanted:
                raise UserError(f"{self.name} models with {name} = {found} are not supported; only {wanted} is")
        for name, of_shape in self.aliases.items():
            found, wanted = getattr(config, name), getattr(config, self.fields[of_shape])
            if found != wanted:
                raise UserError(
                    f"{self.name} models with {name} = {found} other than {self.fields[of_shape]} = {wanted} are not "
                    "supported"
                )

    def shape(self, config: PretrainedConfig) -> Shape:
        """The shape that ``config`` describes (defaults of older configs filled in).

        Raises:
            UserError: no model can have it.
        """
        values: dict[str, Any] = {name: getattr(config, field, None) for name, field in self.fields.items()}
        try:
            values["kv_heads"] = values.get("kv_heads") or values["heads"]
            values["head_dim"] = values.get("head_dim") or values["hidden"] // values["heads"]
        except (TypeError, ZeroDivisionError):
            raise UserError(f"the config is of no possible {self.name} model: its sizes are {values}") from None
        shape = Shape(**values)
        sizes = [size for size in vars(shape).values() if size is not None]
        if not all(type(size) is int and 0 < size < 2**31 for size in sizes) or shape.heads % shape.kv_heads:
            raise UserError(
                f"the config is of no possible {self.name} model: of {shape} all must be positive, and heads a "
                "multiple of kv_heads"
            )
        return shape

    def head_size_is_derived(self, config: PretrainedConfig) -> bool:
        """Whether models with this config always have the head size hidden / heads."""
        return "head_dim" not in self.fields or self.derived_head_size(config)

    def keeps_whole_heads(self, config: PretrainedConfig) -> bool:
        """Whether hidden must stay a multiple of heads in a model cut from one with this config."""
        source = self.shape(config)
        return self.whole_heads and source.hidden % source.heads == 0

    def check_shape(self, config: PretrainedConfig, shape: Shape) -> None:
        """Check that a config like this one can describe ``shape``.

        Raises:
            UserError: it can't; the message names shapes that would work.
        """
        if self.chosen_experts and shape.experts and shape.experts < (chosen := getattr(config, self.chosen_experts)):
            raise UserError(
                f"every token of this {self.name} model goes through {chosen} experts: keep at least as many"
            )
        if "kv_heads" not in self.fields and shape.kv_heads != shape.heads:
            raise UserError(f"{self.name} models have no grouped queries: kv_heads must be heads")
        if self.head_size_is_derived(config) and shape.hidden != shape.heads * shape.head_dim:
            fitting = shape.heads * shape.head_dim
            lower = max(shape.hidden // shape.head_dim, 1)
            raise UserError(
                f"this {self.name} config takes hidden / heads for the head size, {shape.head_dim}, so hidden and "
                f"heads shrink together: hidden {shape.hidden} with heads {shape.heads} can't be expressed; choose "
                f"hidden {fitting} with heads {shape.heads}, or hidden {lower * shape.head_dim} with heads {lower}"
            )

        if self.keeps_whole_heads(config) and shape.hidden % shape.heads:
            lower = shape.hidden // shape.heads * shape.heads
            near = [n for n in (lower, lower + shape.heads) if 0 < n <= self.shape(config).hidden]
            raise UserError(
                f"Transformers 5 refuses {self.name} models whose hidden size is no multiple of their heads: hidden "
                f"{shape.hidden} with heads {shape.heads}; choose hidden {' or '.join(map(str, near))}"
            )

    def with_shape(self, config: PretrainedConfig, shape: Shape, blocks: Sequence[int]) -> PretrainedConfig:
        """A copy of ``config`` that describes ``shape``.

        Args:
            config: the source's.
            shape: the new one.
            blocks: the source's number of every block's attention, [shape.layers].

        Raises:
            UserError: see ``check_shape``.
        """
        self.check_shape(config, shape)
        config = copy.deepcopy(config)
        for name, config_field in self.fields.items():
            setattr(config, config_field, getattr(shape, name))
        for config_field, name in self.aliases.items():
            setattr(config, config_field, getattr(shape, name))
        for config_field in self.per_block:
            if (values := getattr(config, config_field, None)) is not None:
                setattr(config, config_field, [values[block] for block in blocks])
        return config

    def is_parallel(self, config: PretrainedConfig) -> bool:
        """Whether attention and MLP of a block read the same input."""
        return self.parallel is not None and bool(getattr(config, self.parallel))

    def refused(self, config: PretrainedConfig) -> dict[str, str]:
        """Kinds of gates that a model can't have, each with the reason."""
        reasons = dict(self.refused_gates)
        if self.is_parallel(config):
            reason = "attention and MLP of a block read the same input, so neither can leave its block: use layer"
            reasons |= {"attention": reason, "mlp": reason}
        return reasons

    def notes(self) -> list[str]:
        """What pruning a model of this family has to mind, in words."""
        notes = [f"no {kind} gates: {reason}" for kind, reason in self.refused_gates.items()]
        if self.parallel is not None:
            notes.append(f"attention and mlp gates only with {self.parallel} = false")
        if "head_dim" not in self.fields:
            notes.append("hidden and heads shrink together: the head size is hidden / heads")
        return notes

    @property
    def inputs(self) -> dict[str, tuple[str, str]]:
        """The modules of a block that read units of a dimension: name → (dimension, sub-layer); not those of experts.

        Each sub-layer has one that reads ``hidden`` and one that reads its heads (``query``) or ``channel``.
        """
        found: dict[tuple[str, str], str] = {}
        for name, role in self.block.items():
            sublayer = next(name for name, roles in SUBLAYERS.items() if role in roles)
            if role in MATRICES and "*" not in name:
                (dimension,) = AXES[role][1].dimensions
                found.setdefault((dimension, sublayer), name)
        return {name: place for place, name in found.items()}

    @property
    def expert_modules(self) -> str | None:
        """The name of a block's experts, with ``*`` for their number; None without experts."""
        return next((name.partition("*")[0] + "*" for name in self.block if "*" in name), None)

    @property
    def ends_linearly(self) -> bool:
        """Whether what an MLP adds to the residual stream is linear in its output matrix: no norm comes after."""
        return Role.MLP_OUT in self.block.values()

    def tied(self, config: PretrainedConfig) -> bool:
        """Whether the output layer is the embedding."""
        return bool(config.tie_word_embeddings)

    def outer_name(self, role: Role) -> str:
        """The name of the one module outside the blocks that has ``role``."""
        return next(name for name, r in self.outer.items() if r is role)

    def modules(self, config: PretrainedConfig) -> Iterator[tuple[str, Role, int | None]]:
        """Every module that holds prunable parameters: (name, role, block or None)."""
        for name, role in self.outer.items():
            yield name, role, None
        for block in range(self.shape(config).layers):
            for name, role in self._in_block(config):
                yield f"{self.blocks}.{block}.{name}", role, block

    def _in_block(self, config: PretrainedConfig) -> Iterator[tuple[str, Role]]:
        for name, role in self.block.items():
            if "*" in name:
                yield from ((name.replace("*", str(n)), role) for n in range(self.shape(config).experts or 0))
            else:
                yield name, role

    def matrices(self, config: PretrainedConfig) -> Counter[str]:
        """How many matrices a block has by what is cut along their other axis than hidden.

        The keys are ``query``, ``key_value``, ``channel`` and ``expert``; matrices that hold several count for each.
        """
        count: Counter[str] = Counter()
        for _, role in self._in_block(config):
            for axis in AXES[role] if role in MATRICES else ():
                count.update(
                    {name: axis.dimensions.count(name) * axis.repeat for name in {*axis.dimensions} - {"hidden"}}
                )
        return count

    def update(self, sublayer: str) -> str:
        """The module within a block whose output the sub-layer adds to the residual stream."""
        norm, out = {
            "attention": (Role.ATTENTION_POST_NORM, Role.ATTENTION_OUT),
            "mlp": (Role.MLP_POST_NORM, Role.MLP_OUT),
        }[sublayer]
        found = {role: name for name, role in self.block.items()}
        name = found.get(norm) or found[out]
        return name.split(".experts.")[0]

    def locate(self, name: str) -> Parameter:
        """The role, block and axes of the parameter called ``name``.

        Raises:
            UserError: the family has no such parameter (a checkpoint of another architecture).
        """
        module, _, kind = name.rpartition(".")
        block: int | None = None
        expert: int | None = None
        role = self.outer.get(module)
        if module.startswith(self.blocks + "."):
            number, _, inner = module[len(self.blocks) + 1 :].partition(".")
            role = self.block.get(re.sub(_NUMBER, ".*.", inner))
            block = int(number) if number.isdigit() else None
            expert = int(found[1]) if (found := re.search(_NUMBER, inner)) else None
        if role is None or kind not in ("weight", "bias"):
            raise UserError(f"'{name}' is no parameter of the family {self.name}: is this model's config right?")
        if kind == "bias":
            return Parameter(role, block, AXES[role][:1], expert=expert)
        return Parameter(role, block, AXES[role], self.norm.offset if role in NORMS else 0.0, expert)

    def of_expert(self, name: str, expert: int) -> str:
        """The name of the same parameter of another expert."""
        head = f"{self.blocks}."
        block, _, inner = name[len(head) :].partition(".")
        return f"{head}{block}.{re.sub(_NUMBER, f'.{expert}.', inner)}"

    def is_buffer(self, name: str) -> bool:
        """Whether ``name`` is something that old checkpoints store and no model reads."""
        return name.endswith(tuple(f".{buffer}" for buffer in self.buffers)) if self.buffers else False

    def scaled_axes(self, parameter: Parameter, tied: bool) -> tuple[str | None, ...]:
        """The factor that is folded into each axis on export.

        With tied embeddings the factor folded into the embedding already reaches the output layer, so the final norm
        stays as it is.
        """
        if tied and parameter.role is Role.FINAL_NORM:
            return tuple(None for _ in parameter.axes)
        return tuple(axis.factor for axis in parameter.axes)
