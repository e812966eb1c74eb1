"""The perplexity of every model that lacks one block, in one forward pass.

Every variant starts from the states that it shares with the whole model, and all variants go through a block together,
so that N removals cost N(N + 1)/2 block evaluations and each block's weights are needed once per batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.models.block_hooks import RunBlock, hooked_blocks
from llmprune.models.causal_lm import token_losses
from llmprune.pruning.scoring.criterion import CRITERIA, Criterion, ScoringJob

Forward = Callable[[Tensor], Tensor]


@CRITERIA.register("perplexity")
class RemovalPerplexity(Criterion):
    """Perplexity of the model without the block (arXiv:2402.02834, section 3.1)."""

    reads = "removals"

    def __init__(self, job: ScoringJob) -> None:
        super().__init__(job)
        self._losses, self._tokens = job.zeros(job.layers + 1), job.zeros(job.layers + 1)

    def losses(self, block: int | None, loss: Tensor, tokens: Tensor) -> None:
        """Add samples; the whole model comes last."""
        place = self.job.layers if block is None else block
        self._losses[place] += loss.sum(dtype=self._losses.dtype)
        self._tokens[place] += tokens.sum()

    def sums(self) -> Sequence[Tensor]:
        return self._losses, self._tokens

    def result(self) -> list[float]:
        return self._perplexities()[:-1]

    def whole(self) -> float:
        """The perplexity of the whole model."""
        return self._perplexities()[-1]

    def _perplexities(self) -> list[float]:
        return (self._losses / self._tokens).exp().tolist()


class Removals:
    """The states of all variants, which go through the model together."""

    def __init__(self, batch_size: int) -> None:
        """Nothing has been removed yet; at most ``batch_size`` samples go through a block at a time."""
        self._batch_size = batch_size
        self._states: list[Tensor] = []

    def advance(self, run: RunBlock, before: Tensor) -> None:
        """Take every variant through the next block, and start the one that skips it from ``before``."""
        self._states = [in_batches(run, states, self._batch_size) for states in self._states]
        self._states.append(before)

    def finish(self, model: PreTrainedModel, forward: Forward, tokens: Tensor, whole: Tensor) -> list[Tensor]:
        """The losses of all variants, and of the whole model last, once all blocks have been passed.

        Args:
            model: the model.
            forward: its forward pass, from tokens to logits.
            tokens: of the samples, [samples, length].
            whole: the final states of the whole model.

        Returns:
            For each the summed losses and token counts, [2, samples].
        """
        ends = [*self._states, whole]
        self._states = []
        return [final_losses(model, forward, tokens, states, self._batch_size) for states in ends]


def final_losses(model: PreTrainedModel, forward: Forward, tokens: Tensor, states: Tensor, batch_size: int) -> Tensor:
    """The loss sums and token counts of samples whose states after the last block are known, [2, samples].

    Everything after the blocks is the model's own.
    """
    found = []
    for start in range(0, len(tokens), batch_size):
        part = slice(start, start + batch_size)
        with hooked_blocks(model, lambda number, run, x, part=part: states[part]):  # type: ignore[misc]
            logits = forward(tokens[part])
        loss, count = token_losses(logits, tokens[part])
        found.append(torch.stack([loss.double(), count.double()]))
    return torch.cat(found, dim=1)


def in_batches(run: RunBlock, states: Tensor, batch_size: int) -> Tensor:
    """A block's output for any number of samples, so many at a time."""
    if len(states) <= batch_size:
        return run(states)
    return torch.cat([run(part) for part in states.split(batch_size)])
