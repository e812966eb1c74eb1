"""The plan: which units of a model stay and which factors are folded into its weights.

Every method of pruning writes a plan, and only surgery applies it. On disk a plan is a JSON file with index lists,
which a person can read and edit, and a safetensors file next to it with the factors::

    plan.json         {"schema", "family", "model", "source", "hidden", "vocabulary",
                       "blocks": [{"attention", "mlp", "heads", "channels", "merge", "experts"}, …], "replacement",
                       "richer_heads", "skipped"}
    plan.safetensors  "hidden", "attention", "mlp", "heads.I", "channels.J", and corrections: "mean.attention.I",
                      "linear.mlp.J", "across.mlp.J", …   (float32; each is optional)
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from llmprune.models.families import RicherHeadsConfig, Shape, shape_from
from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json, save_tensors, temporary_for, write_json


def tensors_beside(path: Path) -> Path:
    """The path of the tensors' file for the plan at ``path``; the file exists only if the plan has tensors."""
    return path.with_suffix(".safetensors")


_KEYS = {  # known keys of a plan file: an unknown key could change what is cut
    "schema", "family", "model", "source", "hidden", "vocabulary", "blocks", "factors", "replacement", "richer_heads",
    "skipped",
}  # fmt: skip


@dataclass(frozen=True)
class KeptBlock:
    """One block of the pruned model with the units that stay (numbers in the source; None = all).

    Attention and MLP may be from two blocks of the source, if everything between them is removed: the residual stream
    after the attention is then the input of the MLP, as within a block.

    Attributes:
        attention: number in the source of the block whose attention is used.
        mlp: number in the source of the block whose MLP is used.
        heads: numbers of the query heads that stay, ascending; a key/value group stays if any of its query heads stays.
        channels: numbers of the MLP channels that stay, ascending.
        merge: blocks of the source whose weighted sum makes the block's weights: pairs of number in the source and
            weight; the weights sum to one; None = no merge.
        experts: numbers of the experts that stay, ascending, in a mixture of experts.
    """

    attention: int
    mlp: int
    heads: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None
    merge: tuple[tuple[int, float], ...] | None = None
    experts: tuple[int, ...] | None = None

    @classmethod
    def whole(cls, index: int, **units: tuple[int, ...] | None) -> "KeptBlock":
        """The source's block ``index``, with the given heads, channels or experts (None = all)."""
        return cls(index, index, **units)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return str(self.attention) if self.attention == self.mlp else f"{self.attention}/{self.mlp}"


@dataclass(frozen=True)
class Plan:
    """A plan: which parts of a model stay.

    Attributes:
        family: name of the model's family.
        model: SHA-256 of the weights that the plan was made for (``fingerprint``).
        source: shape of the source model.
        blocks: blocks that stay, in order.
        hidden: numbers of the hidden dimensions that stay, ascending; None = all.
        factors: factors that the kept weights are multiplied by, float32, each as long as its axis: ``hidden`` [kept
            hidden], ``attention`` and ``mlp`` [kept blocks] (of the sub-layer's contribution to the residual stream; 0
            = no contribution), ``heads.I`` [kept heads], ``channels.J`` [kept channels], where I and J are the source's
            numbers of the block's attention and MLP. Absent = one.
        corrections: predictions of the removed inputs of the output matrices of a block's attention and MLP
            (``attention.I``, ``mlp.J``), float32: ``mean.…`` [removed inputs], their mean, which is added to the bias;
            ``linear.…`` [removed inputs, kept inputs], their coefficients as a sum of the kept inputs, which are added
            to the kept columns. ``across.mlp.J`` [outputs, kept inputs] is added to the kept columns for what the
            removed blocks after the MLP did.
        replacement: description of the replacement module in the place of removed blocks; its weights are only in the
            run, so such a plan is a record and can't be applied; None = no module.
        richer_heads: settings of the richer heads that surgery adds to every attention, initialised as the identity;
            None = none.
        vocabulary: numbers of the tokens that stay, ascending; the pruned model's token i is the source's token
            ``vocabulary[i]``; None = all.
        skipped: sub-layers that are removed from blocks that stay: pairs of ``attention`` or ``mlp`` and the source's
            number of the block that it is from. Such a model needs a modelling file.
    """

    family: str
    model: str
    source: Shape
    blocks: tuple[KeptBlock, ...]
    hidden: tuple[int, ...] | None = None
    factors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    corrections: Mapping[str, torch.Tensor] = field(default_factory=dict)
    replacement: str | None = None
    richer_heads: RicherHeadsConfig | None = None
    vocabulary: tuple[int, ...] | None = None
    skipped: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        """Check that the plan is possible, and uniform over blocks, as configs require.

        Raises:
            UserError: an index is out of range or duplicate, blocks differ in size, or a factor does not fit.
        """
        source = self.source
        _check_order(self.blocks, source.layers)
        _check_indices("hidden", self.hidden, source.hidden)
        _check_indices("vocabulary", self.vocabulary, source.vocabulary or 0)
        _check_skipped(self)
        for block in self.blocks:
            _check_merge(block, source.layers)
            _check_indices(f"heads of block {block}", block.heads, source.heads)
            _check_indices(f"channels of block {block}", block.channels, source.intermediate)
            _check_indices(f"experts of block {block}", block.experts, source.experts or 0)
            per_group = {len(heads) for heads in self.heads_by_group(block).values()}
            if len(per_group) > 1:
                raise UserError(
                    f"block {block} keeps {' and '.join(map(str, sorted(per_group)))} query heads in different "
                    "key/value groups: a config needs the same number in each"
                )
        for what, sizes in {
            "heads": {len(self.heads(block)) for block in self.blocks},
            "key/value groups": {len(self.heads_by_group(block)) for block in self.blocks},
            "channels": {len(self.channels(block)) for block in self.blocks},
            "experts": {len(self.experts(block)) for block in self.blocks},
        }.items():
            if len(sizes) > 1:
                raise UserError(f"blocks keep different numbers of {what} ({sorted(sizes)}): a config needs one number")
        expected = self._factor_lengths()
        for name, factor in self.factors.items():
            if name not in expected or tuple(factor.shape) != (expected[name],):
                raise UserError(
                    f"the plan's factor '{name}' has the shape {list(factor.shape)}, expected "
                    f"[{expected.get(name, 'none')}]"
                )
        if self.richer_heads is not None:
            self.richer_heads.check()
            if not self.richer_heads.residual:
                raise UserError("richer heads that are added to a model must be residual: they begin as the identity")
        possible = self._correction_shapes() if self.corrections else {}
        for name, tensor in self.corrections.items():
            if tuple(tensor.shape) != possible.get(name):
                raise UserError(
                    f"the plan's correction '{name}' has the shape {list(tensor.shape)}, expected "
                    f"{list(possible.get(name, ('none',)))}"
                )

    def heads(self, block: KeptBlock) -> tuple[int, ...]:
        """The query heads of ``block`` that stay."""
        return tuple(range(self.source.heads)) if block.heads is None else block.heads

    def channels(self, block: KeptBlock) -> tuple[int, ...]:
        """The MLP channels of ``block`` that stay."""
        return tuple(range(self.source.intermediate)) if block.channels is None else block.channels

    def experts(self, block: KeptBlock) -> tuple[int, ...]:
        """The experts of ``block`` that stay; empty if the model has no experts."""
        return tuple(range(self.source.experts or 0)) if block.experts is None else block.experts

    def inputs(self, block: KeptBlock, sublayer: str) -> tuple[list[int], list[int]]:
        """The inputs of a sub-layer's output matrix that stay, and those that are removed."""
        size = self.source.head_dim if sublayer == "attention" else 1
        units, count = (
            (self.heads(block), self.source.heads)
            if sublayer == "attention"
            else (self.channels(block), self.source.intermediate)
        )
        rows = [[unit * size + row for row in range(size)] for unit in range(count)]
        gone = set(range(count)) - set(units)
        return [row for unit in units for row in rows[unit]], [row for unit in sorted(gone) for row in rows[unit]]

    def heads_by_group(self, block: KeptBlock) -> dict[int, list[int]]:
        """The key/value groups of ``block`` that stay, each with its query heads that stay."""
        groups: dict[int, list[int]] = {}
        for head in self.heads(block):
            groups.setdefault(head // self.source.heads_per_group, []).append(head)
        return groups

    @property
    def shape(self) -> Shape:
        """The shape of the pruned model."""
        first = self.blocks[0]
        return replace(
            self.source,
            layers=len(self.blocks),
            hidden=self.source.hidden if self.hidden is None else len(self.hidden),
            heads=len(self.heads(first)),
            kv_heads=len(self.heads_by_group(first)),
            intermediate=len(self.channels(first)),
            experts=len(self.experts(first)) or None,
            vocabulary=self.source.vocabulary if self.vocabulary is None else len(self.vocabulary),
        )

    def _factor_lengths(self) -> dict[str, int]:
        shape = self.shape
        lengths = {"hidden": shape.hidden, "attention": shape.layers, "mlp": shape.layers}
        for block in self.blocks:
            lengths[f"heads.{block.attention}"] = shape.heads
            lengths[f"channels.{block.mlp}"] = shape.intermediate
        return lengths

    def _correction_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for block in self.blocks:
            for sublayer, number in (("attention", block.attention), ("mlp", block.mlp)):
                kept, gone = self.inputs(block, sublayer)
                shapes[f"mean.{sublayer}.{number}"] = (len(gone),)
                shapes[f"linear.{sublayer}.{number}"] = (len(gone), len(kept))
            shapes[f"across.mlp.{block.mlp}"] = (self.source.hidden, len(self.inputs(block, "mlp")[0]))
        return shapes

    def check_applicable(self) -> None:
        """Raise ``UserError`` if the plan alone does not define the pruned model."""
        if self.replacement is not None:
            raise UserError(
                f"the plan puts a trained replacement module ({self.replacement}) in the place of blocks, and only the "
                "run has its weights: use `llmprune convert RUN`"
            )

    def save(self, path: Path | str) -> None:
        """Write the plan to ``path`` (.json) and its factors to a file next to it (.safetensors).

        Raises:
            UserError: a factor or a correction has a value that is not finite.
        """
        path = Path(path)
        self._check_finite(path)
        if self.factors or self.corrections:
            tensors = {name: t.detach().float().cpu() for name, t in {**self.factors, **self.corrections}.items()}
            temporary = temporary_for(path)
            try:
                save_tensors(temporary, tensors)
                temporary.replace(tensors_beside(path))
            finally:
                temporary.unlink(missing_ok=True)
        values = {
            "schema": 1,
            "family": self.family,
            "model": self.model,
            "source": asdict(self.source),
            "hidden": self.hidden,
            "vocabulary": self.vocabulary,
            "blocks": [asdict(block) for block in self.blocks],
            "factors": tensors_beside(path).name if self.factors or self.corrections else None,
            "replacement": self.replacement,
            "richer_heads": None if self.richer_heads is None else asdict(self.richer_heads),
            "skipped": [f"{sublayer}.{number}" for sublayer, number in self.skipped],
        }
        write_json(path, values)

    def _check_finite(self, path: Path) -> None:
        for name, tensor in {**self.factors, **self.corrections}.items():
            if not tensor.float().isfinite().all():
                raise UserError(f"{path}: '{name}' holds NaN or infinite numbers: the plan can't be carried out")

    @classmethod
    def load(cls, path: Path | str) -> "Plan":
        """Read a plan from a file.

        Raises:
            UserError: a file is missing or damaged, or the plan is impossible.
        """
        path = Path(path)
        values = read_json(path)
        try:
            if values["schema"] != 1:
                raise UserError(f"{path} has schema {values['schema']}; this version reads 1")
            if unknown := sorted(key for key, value in values.items() if key not in _KEYS and value is not None):
                raise UserError(f"{path} has the key '{unknown[0]}', which plans of this version do not have")
            blocks = tuple(
                KeptBlock(
                    block["attention"],
                    block["mlp"],
                    _indices(block["heads"]),
                    _indices(block["channels"]),
                    None if block.get("merge") is None else tuple((number, w) for number, w in block["merge"]),
                    _indices(block.get("experts")),
                )
                for block in values["blocks"]
            )
            tensors = _tensors(path.parent / Path(values["factors"]).name) if values["factors"] else {}
            corrections = {name: t for name, t in tensors.items() if name.startswith(("mean.", "linear.", "across."))}
            plan = cls(
                family=values["family"],
                model=values["model"],
                source=shape_from(values["source"]),
                blocks=blocks,
                hidden=_indices(values["hidden"]),
                factors={name: tensor for name, tensor in tensors.items() if name not in corrections},
                corrections=corrections,
                replacement=values.get("replacement"),
                richer_heads=None if (heads := values.get("richer_heads")) is None else RicherHeadsConfig(**heads),
                vocabulary=_indices(values.get("vocabulary")),
                skipped=tuple(
                    (name, int(number))
                    for name, _, number in (one.partition(".") for one in values.get("skipped") or ())
                ),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path} is not a plan ({type(error).__name__}: {error})") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"the factors of {path} can't be read ({error})") from None
        plan._check_finite(path)
        return plan


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file but a folder, a pipe or a device")
    return load_file(path)


def _indices(values: Any) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)


def _check_order(blocks: tuple[KeptBlock, ...], layers: int) -> None:
    """Check that blocks have the source's order: attention 0, MLP 0, attention 1, MLP 1 and so on."""
    if not blocks:
        raise UserError("the plan keeps no blocks")
    if not all(isinstance(i, int) and 0 <= i < layers for block in blocks for i in (block.attention, block.mlp)):
        raise UserError(f"the plan's blocks must be whole numbers between 0 and {layers - 1}")
    order = [position for block in blocks for position in (2 * block.attention, 2 * block.mlp + 1)]
    if any(b <= a for a, b in pairwise(order)):
        raise UserError("the plan's blocks must be ascending, each once")


def _check_skipped(plan: Plan) -> None:
    """Check that removed sub-layers are of blocks that stay, each once, and leave every block something."""
    for sublayer, number in plan.skipped:
        if sublayer not in ("attention", "mlp"):
            raise UserError(f"the plan skips '{sublayer}.{number}', which is neither attention.N nor mlp.N")
        if number not in [getattr(block, sublayer) for block in plan.blocks]:
            raise UserError(f"the plan skips {sublayer}.{number}, of a block that does not stay")
    if len(set(plan.skipped)) < len(plan.skipped):
        raise UserError("the plan skips a sub-layer twice")
    for block in plan.blocks:
        of_block = {("attention", block.attention), ("mlp", block.mlp)}
        if of_block <= set(plan.skipped):
            raise UserError(f"the plan skips both parts of block {block}: remove the block")
        if block.merge is not None and of_block & set(plan.skipped):
            raise UserError(f"block {block} is a merge, and can't lose a part")


def _check_merge(block: KeptBlock, layers: int) -> None:
    if block.merge is None:
        return
    if block.attention != block.mlp:
        raise UserError(f"block {block} can't be a merge: its attention and MLP come from two blocks")
    if not all(isinstance(number, int) and 0 <= number < layers for number, _ in block.merge):
        raise UserError(f"the merge of block {block} must name blocks between 0 and {layers - 1}")
    if not math.isclose(sum(weight for _, weight in block.merge), 1, abs_tol=1e-6):
        raise UserError(f"the weights of the merge of block {block} must add up to one")


def _check_indices(what: str, indices: tuple[int, ...] | None, size: int) -> None:
    if indices is None:
        return
    if not indices:
        raise UserError(f"the plan keeps no {what}")
    if not all(isinstance(index, int) for index in indices):
        raise UserError(f"the plan's {what} must be whole numbers")
    if any(b <= a for a, b in pairwise(indices)) or indices[0] < 0 or indices[-1] >= size:
        raise UserError(f"the plan's {what} must be ascending, each once, between 0 and {size - 1}")
