"""The perplexities of all models without one block, computed in one forward pass.

Every variant starts from the states that it shares with the whole model, and all variants pass through a block
together, so that N removals cost N(N + 1)/2 block evaluations and each block's weights are needed once per batch.
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
        """Add the losses of samples; the whole model's sum is the last element."""
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
    """The hidden states of all variants, which pass through the model together."""

    def __init__(self, batch_size: int) -> None:
        """Start with no variants; at most ``batch_size`` samples pass through a block at a time."""
        self._batch_size = batch_size
        self._states: list[Tensor] = []

    def advance(self, run: RunBlock, before: Tensor) -> None:
        """Run the next block on every variant, and start the variant that skips this block from ``before``."""
        self._states = [in_batches(run, states, self._batch_size) for states in self._states]
        self._states.append(before)

    def finish(self, model: PreTrainedModel, forward: Forward, tokens: Tensor, whole: Tensor) -> list[Tensor]:
        """The losses of all variants after the last block, and those of the whole model at the end.

        Args:
            model: model that is scored.
            forward: forward pass of the model, from tokens to logits.
            tokens: tokens of the samples, [samples, length].
            whole: final states of the whole model.

        Returns:
            The summed losses and token counts for each variant, [2, samples].
        """
        ends = [*self._states, whole]
        self._states = []
        return [final_losses(model, forward, tokens, states, self._batch_size) for states in ends]


def final_losses(model: PreTrainedModel, forward: Forward, tokens: Tensor, states: Tensor, batch_size: int) -> Tensor:
    """The loss sums and token counts of samples from their states after the last block, [2, samples].

    The model's own forward pass computes everything after the blocks.
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
    """A block's output for any number of samples, ``batch_size`` at a time."""
    if len(states) <= batch_size:
        return run(states)
    return torch.cat([run(part) for part in states.split(batch_size)])
