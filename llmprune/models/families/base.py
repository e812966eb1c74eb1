"""Families: the only description of architectures in llmprune.

A ``Family`` is one declarative entry. It names the modules of a Hugging Face causal LM and gives each a ``Role``;
everything else (the meaning of each axis of a weight, what a gate multiplies, what surgery cuts and folds) follows from
the role through the table ``AXES``.
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

_NUMBER = r"\.(\d+)\."  # pattern of an expert's number in a name within a block


class Parameter(NamedTuple):
    """A parameter of a model as its family describes it.

    Attributes:
        role: role of the parameter's module.
        block: number of the parameter's block; None outside the blocks.
        axes: axes of the tensor.
        offset: number that the model adds to the tensor before using it (for norms that add one).
        expert: number of the parameter's expert; None outside the experts.
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
    """The form of the family's norms.

    An RMS norm computes ``x / sqrt(mean(x²) + eps) · (offset + weight)``; one that is ``centred`` (LayerNorm) subtracts
    the mean first and adds a bias last.

    Attributes:
        epsilon: name of the module's attribute that contains eps.
        centred: whether the norm is a LayerNorm.
        offset: number added to the weight.
    """

    epsilon: str
    centred: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class Family:
    """One Hugging Face model family.

    Attributes:
        name: name of the family on the command line and in plans.
        description: description of the family in one sentence, for ``llmprune families``.
        model_types: values of ``model_type`` in the family's configs.
        outer: roles of the modules outside the blocks, by name.
        blocks: name of the module list that contains the blocks.
        block: roles of the modules inside a block, by name within it; ``*`` replaces the number of an expert.
        norm: form of the family's norms.
        fields: names of config fields by field of ``Shape``; without ``head_dim`` the config has no field for the head
            size, which is then always hidden / heads.
        per_block: names of config fields that list a value for every block (for its attention).
        aliases: names of further config fields with a value of ``Shape``, each with the field of ``Shape``.
        requires: values that config fields must have, by name.
        chosen_experts: name of the config field with the number of experts that a token passes through; None = no
            experts.
        parallel: name of the config field for whether attention and MLP of a block read the same input; None = they
            never do.
        scaled_embedding: whether the model multiplies the embedding's output by the square root of the hidden size.
        softcap: name of the config field with the bound of the logits; None = no bound.
        whole_heads: whether hidden must be a multiple of heads although the config has a field for the head size:
            Transformers 5 refuses other configs of such models.
        derived_head_size: function of a config: whether the head size is hidden / heads although the config has a field
            for it.
        refused_gates: reasons why the family can't have some kinds of gates, by kind.
        tuple_blocks: whether a block returns its output in a tuple.
        document_masks: whether a mask must restrict attention to documents; otherwise Transformers makes it from
            positions that restart.
        buffers: names within a block of tensors that old checkpoints contain and no model reads.
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
        """Check that ``config`` is a variant that this entry describes.

        Raises:
            UserError: the variant is not supported.
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
        """The shape that ``config`` describes (fields missing in older configs get defaults).

        Raises:
            UserError: no model can have this shape.
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
        """Check that a config of this model can describe ``shape``.

        Raises:
            UserError: the config can't describe it; the message names shapes that would work.
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
            config: config of the source model.
            shape: shape of the new model.
            blocks: number of the source block whose attention each new block has, [shape.layers].

        Raises:
            UserError: see ``check_shape``.
        """
        self.check_shape(config, shape)
        config = copy.deepcopy(config)
        for name, config_field in self.fields.items():
            if name != "vocabulary" or shape.vocabulary is not None:
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
        """The kinds of gates that a model can't have, each with the reason."""
        reasons = dict(self.refused_gates)
        if self.is_parallel(config):
            reason = "attention and MLP of a block read the same input, so neither can leave its block: use layer"
            reasons |= {"attention": reason, "mlp": reason}
        return reasons

    def notes(self) -> list[str]:
        """Notes on the pruning of models of this family, as texts."""
        notes = [f"no {kind} gates: {reason}" for kind, reason in self.refused_gates.items()]
        if self.parallel is not None:
            notes.append(f"attention and mlp gates only with {self.parallel} = false")
        if "head_dim" not in self.fields:
            notes.append("hidden and heads shrink together: the head size is hidden / heads")
        return notes

    @property
    def inputs(self) -> dict[str, tuple[str, str]]:
        """The modules of a block that read a dimension's units, without experts: name → (dimension, sub-layer).

        Each sub-layer has one module that reads ``hidden`` and one that reads its heads (``query``) or ``channel``.
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
        """The name of a block's experts, with ``*`` in place of their number; None without experts."""
        return next((name.partition("*")[0] + "*" for name in self.block if "*" in name), None)

    @property
    def ends_linearly(self) -> bool:
        """Whether an MLP's contribution to the residual stream is linear in its output matrix: no norm follows."""
        return Role.MLP_OUT in self.block.values()

    def tied(self, config: PretrainedConfig) -> bool:
        """Whether the output layer shares the embedding's weight."""
        return bool(config.tie_word_embeddings)

    def outer_name(self, role: Role) -> str:
        """The name of the module outside the blocks that has ``role``."""
        return next(name for name, r in self.outer.items() if r is role)

    def modules(self, config: PretrainedConfig) -> Iterator[tuple[str, Role, int | None]]:
        """Every module with prunable parameters: (name, role, block or None)."""
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
        """The number of a block's matrices by the dimension of the axis that is not hidden.

        The keys are ``query``, ``key_value``, ``channel`` and ``expert``; a matrix that contains several counts for
        each.
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
        """The role, block and axes of the parameter with the name ``name``.

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
        """The name of a parameter of another expert, from that of one expert's parameter."""
        head = f"{self.blocks}."
        block, _, inner = name[len(head) :].partition(".")
        return f"{head}{block}.{re.sub(_NUMBER, f'.{expert}.', inner)}"

    def is_buffer(self, name: str) -> bool:
        """Whether ``name`` is a tensor that old checkpoints contain and no model reads."""
        return name.endswith(tuple(f".{buffer}" for buffer in self.buffers)) if self.buffers else False

    def scaled_axes(self, parameter: Parameter, tied: bool) -> tuple[str | None, ...]:
        """The gate factor that is folded into each axis on export.

        With tied embeddings, the factor folded into the embedding is also in the output layer, so the final norm stays
        as it is.
        """
        if tied and parameter.role is Role.FINAL_NORM:
            return tuple(None for _ in parameter.axes)
        return tuple(axis.factor for axis in parameter.axes)
