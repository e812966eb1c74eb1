"""Corrections of the MLPs before removed blocks: they also do a part of what these blocks did.

Blocks p + 1 … q go. The residual stream after block q is that after block p plus what these blocks added, y. A part of
y is linear in the inputs a of the output matrix of block p's MLP, y ≈ A a. A is added to that matrix, so the model has
no more parameters and takes no more time than without the correction. A is fitted by least squares on some of the
calibration samples and tested on the others.

A linear map of an MLP's output in the place of removed blocks: ReplaceMe (arXiv:2505.02819). Here it is fitted to the
inputs of the MLP's output matrix, which are more numbers than its outputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmprune.models.block_hooks import RunBlock
from llmprune.models.families import Family
from llmprune.models.least_squares import RIDGES, least_squares
from llmprune.models.read_inputs import reading_inputs
from llmprune.plans.plan import Plan


def gaps(plan: Plan, family: Family) -> dict[int, int]:
    """The blocks whose MLPs can take over a part of the removed blocks after them, each with the last of these.

    In a family whose MLPs end with a norm, or in experts, there are none.
    """
    if not family.ends_linearly or plan.source.experts is not None:
        return {}
    ends = [*(block.attention for block in plan.blocks[1:]), plan.source.layers]
    return {
        block.mlp: end - 1
        for block, end in zip(plan.blocks, ends, strict=True)
        if end > block.mlp + 1 and block.merge is None and ("mlp", block.mlp) not in plan.skipped
    }


@dataclass(frozen=True)
class Gap:
    """A block with removed blocks after it.

    Attributes:
        matrix: module with the output matrix of the block's MLP.
        kept: numbers of the matrix's inputs that stay.
        run: function that runs the block.
        states: the block's inputs, [samples, length, hidden].
    """

    matrix: nn.Module
    kept: Tensor
    run: RunBlock
    states: Tensor

    def correction(self, after: Tensor, fitted: int, batch_size: int) -> Tensor | None:
        """What is added to the columns of the matrix that stay, float32 [outputs, kept inputs].

        Args:
            after: residual stream after the removed blocks, [samples, length, hidden].
            fitted: number of samples to fit on; the others choose the ridge.
            batch_size: number of samples in one forward pass.

        Returns:
            None if no correction has a lower error than none on the samples that it was not fitted on.
        """
        size, hidden = len(self.kept), after.shape[-1]
        xx, xy = (after.new_zeros(size, columns, dtype=torch.float64) for columns in (size, hidden))
        for a, y in self._read(self.states[:fitted], after[:fitted], batch_size):
            xx += a.T @ a
            xy += a.T @ y
        ways = [None, *(least_squares(xx, xy, ridge) for ridge in RIDGES)]
        errors = torch.zeros(len(ways), dtype=torch.float64, device=after.device)
        for a, y in self._read(self.states[fitted:], after[fitted:], batch_size):
            for place, way in enumerate(ways):
                errors[place] += (y if way is None else y - a @ way).square().sum()
        best = ways[int(errors.nan_to_num(nan=torch.inf).argmin())]
        return None if best is None else best.T.float()

    def _read(self, states: Tensor, after: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The inputs that stay, [tokens, kept inputs], and what the removed blocks add, [tokens, hidden]; float64."""
        found: list[Tensor] = []
        with reading_inputs({"": self.matrix}, {"": found.append}):
            for part, then in zip(states.split(batch_size), after.split(batch_size), strict=True):
                missing = then - self.run(part)
                yield found.pop().flatten(0, -2)[:, self.kept].double(), missing.flatten(0, -2).double()
