"""Corrections of output matrices, in closed form: of narrowed sub-layers, and of MLPs before removed blocks.

A sub-layer's contribution to the residual stream is linear in the input of its output matrix W. The kept inputs a_k
predict a part of the removed inputs a_g: a_g ≈ L a_k + m, with L and m from calibration samples; W_g L is added to the
kept columns and W_g m to the bias. With L by least squares this equals fitting the kept columns again to the whole
matrix's output.

MLPs before removed blocks: ``gaps.py``.

The error on the fitted tokens is no measure of quality, so each matrix is fitted on some of the calibration samples and
tested on the others. The ridge is the one with the lowest error there, and a matrix whose error there is not lower than
without a correction stays as it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from llmprune.models.block_hooks import RunBlock, blocks_of, hooked_blocks
from llmprune.models.families import Family, Shape, family_of
from llmprune.models.least_squares import LEAST, RIDGES, least_squares, samples_fitted, samples_for
from llmprune.models.read_inputs import reading_inputs
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.pruning.scoring.removals import in_batches
from llmprune.pruning.selection.gaps import Gap, gaps
from llmprune.utils.errors import UserError
from llmprune.utils.progress import Progress

if TYPE_CHECKING:
    from llmprune.pruning.selection.methods import ScoredModel


@dataclass
class _Read:
    """Sums over tokens, float64, of the inputs a of an output matrix: a, and a · kept aᵀ."""

    kept: Tensor
    gone: Tensor
    tokens: int
    total: Tensor
    products: Tensor | None

    def add(self, values: Tensor) -> None:
        a = values.flatten(0, -2).double()
        self.tokens += len(a)
        self.total += a.sum(0)
        if self.products is not None:
            self.products += a.T @ a[:, self.kept]


class _Tried:
    """The squared errors of a matrix's output on samples that it was not fitted on, for each possible correction."""

    def __init__(self, read: _Read, module: nn.Module, ways: Sequence[Mapping[str, Tensor]]) -> None:
        """Start with no samples.

        Args:
            read: sums that the corrections were fitted on.
            module: module with the output matrix.
            ways: possible corrections, in the form of plans.
        """
        self._kept, self._gone = read.kept, read.gone
        self._weight = module.get_parameter("weight").float()[:, read.gone].T
        self._ways = ways
        self.errors = torch.zeros(1 + len(ways), dtype=torch.float64, device=read.total.device)

    def add(self, values: Tensor) -> None:
        a = values.flatten(0, -2).float()
        kept, gone = a[:, self._kept], a[:, self._gone]
        for place, way in enumerate(({}, *self._ways)):
            missed = gone
            if "linear" in way:
                missed = missed - kept @ way["linear"].float().T
            if "mean" in way:
                missed = missed - way["mean"].float()
            self.errors[place] += (missed @ self._weight).double().square().sum()

    def best(self) -> Mapping[str, Tensor]:
        """The correction with the lowest error; an empty one if none is better than no correction."""
        place = int(self.errors.nan_to_num(nan=torch.inf).argmin())
        return self._ways[place - 1] if place else {}


def check_correction(kind: str, config: PretrainedConfig) -> None:
    """Raise ``UserError`` if models of this config can't have this kind of correction."""
    if kind != "mean":
        return
    family = family_of(config)
    with torch.device("meta"):
        names = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    for name, (dimension, _) in family.inputs.items():
        if dimension != "hidden" and f"{family.blocks}.0.{name}.bias" not in names:
            raise UserError(
                f"this {family.name} model has no biases in {name} to fold means into: take the correction refit"
            )


def is_correctable(plan: Plan, kind: str, family: Family) -> bool:
    """Whether a plan removes heads or channels or, for ``refit``, blocks after an MLP that can be corrected."""
    narrower = any(plan.inputs(block, sublayer)[1] for block in plan.blocks for sublayer in ("attention", "mlp"))
    return narrower or (kind == "refit" and bool(gaps(plan, family)))


@torch.no_grad()
def corrected(plan: Plan, kind: str, scored: "ScoredModel") -> Plan:
    """The plan with corrections of the output matrices of all attentions and MLPs that it narrows.

    By ``refit``, MLPs before removed blocks are corrected too.

    Args:
        plan: plan with the units that stay.
        kind: kind of correction: ``mean`` folds the mean of the removed inputs into the bias, for models that have one
            there; ``refit`` fits the kept columns by least squares, and the bias of narrowed sub-layers.
        scored: model and its calibration samples, for one forward pass, with a matrix of [inputs, kept inputs] in
            float64 for one block at a time.

    Raises:
        UserError: the model has no biases for ``mean``, blocks are merged, or the samples are too few.
    """
    model, samples = scored.model, scored.tokens
    family = family_of(model.config)
    check_samples(plan, kind, family, *samples.shape)
    fitted = samples_fitted(len(samples))
    blocks, numbers = blocks_of(model), {block.attention: block for block in plan.blocks}
    of_mlp = {block.mlp: block for block in plan.blocks}
    outputs = {sublayer: name for name, (dimension, sublayer) in family.inputs.items() if dimension != "hidden"}
    narrowed = {
        (sublayer, number): block
        for block in plan.blocks
        for sublayer, number in (("attention", block.attention), ("mlp", block.mlp))
        if sublayer in outputs and plan.inputs(block, sublayer)[1]
    }
    if any(block.merge is not None for block in numbers.values()):
        raise UserError("merged blocks have no matrices of their own to correct: leave out the merge or the correction")
    found: dict[str, Tensor] = {}
    ends = gaps(plan, family) if kind == "refit" else {}
    open_gaps: dict[int, tuple[int, Gap]] = {}  # the block before the gap, by the last of the removed blocks

    def visit(number: int, run: RunBlock, states: Tensor) -> Tensor:
        reads = {
            sublayer: _empty(plan, narrowed[sublayer, number], sublayer, kind, states.device)
            for sublayer in outputs
            if (sublayer, number) in narrowed
        }
        modules = {sublayer: blocks[number].get_submodule(outputs[sublayer]) for sublayer in reads}
        with reading_inputs(modules, {sublayer: read.add for sublayer, read in reads.items()}):
            after = in_batches(run, states[:fitted], scored.batch_size)
        ways = {name: _ways(read, modules[name], family.name) for name, read in reads.items()}
        tried = {name: _Tried(read, modules[name], ways[name]) for name, read in reads.items()}
        with reading_inputs(modules, {sublayer: one.add for sublayer, one in tried.items()}):
            after = torch.cat([after, in_batches(run, states[fitted:], scored.batch_size)])
        for sublayer, one in tried.items():
            found.update({f"{name}.{sublayer}.{number}": tensor.float().cpu() for name, tensor in one.best().items()})
        if number in ends:
            matrix = blocks[number].get_submodule(outputs["mlp"])
            stay = torch.tensor(plan.inputs(of_mlp[number], "mlp")[0], device=states.device)
            open_gaps[ends[number]] = number, Gap(matrix, stay, run, states)
        if number in open_gaps:
            place, gap = open_gaps.pop(number)
            if (correction := gap.correction(after, fitted, scored.batch_size)) is not None:
                found[f"across.mlp.{place}"] = correction.cpu()
        progress.update()
        return after[:1, :1] if number == len(blocks) - 1 else after

    blocks = nn.ModuleList(blocks)  # the blocks themselves, without hooks
    progress = Progress(desc=f"fitting the correction {kind}", total=len(blocks), unit="blocks")
    with progress, hooked_blocks(model, visit):
        model(input_ids=samples, use_cache=False)
    return replace(plan, corrections=found)


def check_samples(plan: Plan, kind: str, family: Family, samples: int, length: int) -> None:
    """Refuse a fit on too few tokens.

    Args:
        plan: plan with the units that stay.
        kind: kind of the correction.
        family: family of the model.
        samples: number of calibration samples.
        length: number of tokens in each sample.

    Raises:
        UserError: there are too few tokens; the message contains a number that is enough.
    """
    before = gaps(plan, family) if kind == "refit" else {}
    inputs = [
        len(kept)
        for block in plan.blocks
        for sublayer, number in (("attention", None), ("mlp", block.mlp))
        for kept, gone in [plan.inputs(block, sublayer)]
        if gone or number in before
    ]
    check_tokens(max(inputs, default=0), kind, samples, length)


def most_inputs(shape: Shape) -> int:
    """The largest number of inputs of a matrix that a correction may fit, in a model of this shape."""
    return max(shape.heads * shape.head_dim, 0 if shape.experts else shape.intermediate)


def check_tokens(inputs: int, kind: str, samples: int, length: int) -> None:
    """Refuse a fit of ``inputs`` kept inputs on too few tokens, see ``check_samples``."""
    if kind == "none":
        return
    if samples < 2:
        raise UserError("a correction is fitted on some samples and tried on others: score at least two (--samples)")
    if kind == "refit" and (tokens := samples_fitted(samples) * length) < LEAST * inputs:
        enough = samples_for(math.ceil(LEAST * inputs / length))
        raise UserError(
            f"the correction refit fits {inputs:,} inputs on {tokens:,} calibration tokens, which must be {LEAST} for "
            f"each input at least: score again with --samples {enough} (of {length} tokens)"
        )


def _empty(plan: Plan, block: KeptBlock, sublayer: str, kind: str, device: torch.device) -> _Read:
    kept, gone = (torch.tensor(rows, device=device) for rows in plan.inputs(block, sublayer))
    size = len(kept) + len(gone)
    total = torch.zeros(size, dtype=torch.float64, device=device)
    products = torch.zeros(size, len(kept), dtype=torch.float64, device=device) if kind == "refit" else None
    return _Read(kept, gone, 0, total, products)


def _ways(read: _Read, module: nn.Module, family: str) -> list[dict[str, Tensor]]:
    """The possible corrections of a matrix, in the form of plans."""
    mean = read.total / read.tokens
    biased = getattr(module, "bias", None) is not None
    if read.products is None:
        if not biased:
            raise UserError(f"this {family} model has no biases to fold means into: take the correction refit")
        return [{"mean": mean[read.gone]}]
    products = read.products / read.tokens
    if biased:
        products -= mean[:, None] * mean[read.kept]
    own, across = products[read.kept], products[read.gone]
    found = []
    for ridge in RIDGES:
        linear = least_squares(own, across.T, ridge).T
        bias = {"mean": mean[read.gone] - linear @ mean[read.kept]} if biased else {}
        found.append({"linear": linear, **bias})
    return found
