"""What the output matrices of narrowed sub-layers can make up for in closed form.

What a sub-layer adds to the residual stream is linear in what its output matrix W reads. Of inputs that go, a_g, the
rest can stand in for a part: a_g ≈ L a_k + m, with L and m from calibration samples; W_g L joins the kept columns and
W_g m the bias. With L by least squares this is the same as fitting the kept columns anew to the whole matrix's output.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from llmprune.errors import UserError
from llmprune.families import family_of
from llmprune.models.walking import Run, blocks_of, visited
from llmprune.plans import KeptBlock, Plan
from llmprune.scoring.removals import in_batches

if TYPE_CHECKING:
    from llmprune.scoring.selection import Opened

CORRECTIONS = ("none", "mean", "refit")
RIDGE = 1e-4  # of the mean square of what the matrix reads


@dataclass
class _Read:
    """Sums over tokens, float64, of what an output matrix reads: a, and a · kept aᵀ."""

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


def check_correction(kind: str, config: PretrainedConfig) -> None:
    """Raise ``UserError`` if models of this config can't be corrected so."""
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


def is_correctable(plan: Plan) -> bool:
    """Whether a plan takes heads or channels."""
    return any(plan.inputs(block, sublayer)[1] for block in plan.blocks for sublayer in ("attention", "mlp"))


@torch.no_grad()
def corrected(plan: Plan, kind: str, opened: "Opened") -> Plan:
    """The plan with corrections of the output matrices of all attentions and MLPs that it narrows.

    Args:
        plan: which units stay.
        kind: ``mean`` folds the mean of what goes into the bias, for models that have one there; ``refit`` fits the
            kept columns by least squares, and the bias where there is one.
        opened: the model and its calibration samples; one walk through the model, with a matrix of [inputs, kept
            inputs] in float64 for one block at a time.

    Raises:
        UserError: there are no biases for ``mean``, or blocks are merged.
    """
    model, samples = opened.model, opened.tokens
    family = family_of(model.config)
    blocks, numbers = blocks_of(model), {block.attention: block for block in plan.blocks}
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

    def visit(number: int, run: Run, states: Tensor) -> Tensor:
        reads = {
            sublayer: _empty(plan, narrowed[sublayer, number], sublayer, kind, states.device)
            for sublayer in outputs
            if (sublayer, number) in narrowed
        }
        modules = {sublayer: blocks[number].get_submodule(outputs[sublayer]) for sublayer in reads}
        hooks = [
            module.register_forward_pre_hook(lambda m, inputs, read=reads[sublayer]: read.add(inputs[0]))
            for sublayer, module in modules.items()
        ]
        try:
            after = in_batches(run, states, opened.batch_size)
        finally:
            for hook in hooks:
                hook.remove()
        for sublayer, read in reads.items():
            place = f"{sublayer}.{number}"
            solved = _solved(read, modules[sublayer], family.name)
            found.update({f"{name}.{place}": tensor.float().cpu() for name, tensor in solved.items()})
        return after[:1, :1] if number == len(blocks) - 1 else after

    blocks = nn.ModuleList(blocks)  # as they are before they are visited
    with visited(model, visit):
        model(input_ids=samples, use_cache=False)
    return replace(plan, corrections=found)


def _empty(plan: Plan, block: KeptBlock, sublayer: str, kind: str, device: torch.device) -> _Read:
    kept, gone = (torch.tensor(rows, device=device) for rows in plan.inputs(block, sublayer))
    size = len(kept) + len(gone)
    total = torch.zeros(size, dtype=torch.float64, device=device)
    products = torch.zeros(size, len(kept), dtype=torch.float64, device=device) if kind == "refit" else None
    return _Read(kept, gone, 0, total, products)


def _solved(read: _Read, module: nn.Module, family: str) -> dict[str, Tensor]:
    mean = read.total / read.tokens
    biased = getattr(module, "bias", None) is not None
    if read.products is None:
        if not biased:
            raise UserError(f"this {family} model has no biases to fold means into: take the correction refit")
        return {"mean": mean[read.gone]}
    products = read.products / read.tokens
    if biased:
        products -= mean[:, None] * mean[read.kept]
    own, across = products[read.kept], products[read.gone]
    own.diagonal().add_(RIDGE * own.diagonal().mean().clamp(min=1e-30))
    linear = torch.linalg.solve(own, across, left=False)
    return {"linear": linear} | ({"mean": mean[read.gone] - linear @ mean[read.kept]} if biased else {})
