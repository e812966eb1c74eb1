"""Selections that run the model again after every removal."""

from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

from llmprune.models.block_hooks import RunBlock, hooked_blocks, shortened
from llmprune.models.causal_lm import token_losses
from llmprune.plans.plan import KeptBlock
from llmprune.pruning.scoring.criterion import CRITERIA, ScoreSection, ScoringJob
from llmprune.pruning.scoring.scorer import Scorer, block_passes
from llmprune.pruning.selection.methods import SELECTIONS, Request, ScoredModel, lowest_blocks, no_criterion, without
from llmprune.utils.errors import UserError
from llmprune.utils.progress import Progress


@SELECTIONS.register("iterative")
def iterative(request: Request) -> tuple[KeptBlock, ...]:
    """The block with the lowest score is removed and the rest is scored again, until enough blocks are removed."""
    name = request.criterion
    if CRITERIA[name].section is not ScoreSection.BLOCKS:
        raise UserError(f"iterative selection needs a criterion of blocks; {name} is none")
    removable, scored = set(request.removable()), request.open()
    settings = request.scores.settings
    live = list(range(request.layers))
    samples = 0 if scored.samples is None else len(scored.samples)
    passes = samples * sum(block_passes([name], request.layers - gone) for gone in range(request.remove))
    progress = Progress(desc="iterative", total=passes, unit="block passes")
    for _ in range(request.remove):
        with shortened(scored.model, live):
            job = ScoringJob(
                scored.model.config,
                scored.model.device,
                settings["row_reduction"],
                settings["matrix_reduction"],
                seed=settings["seed"],
            )
            scorer = Scorer(scored.model, [name], job, batch_size=scored.batch_size, told=progress.update)
            if scorer.reads_text:
                for tokens in scored.tokens.split(scored.batch_size):
                    scorer.update(tokens)
            scores = scorer.scores()[ScoreSection.BLOCKS.value][name]
        places = [place for place, block in enumerate(live) if block in removable]
        (gone,) = lowest_blocks(scores, places, 1)
        del live[gone]
    progress.close()
    return tuple(KeptBlock.whole(block) for block in live)


@SELECTIONS.register("greedy")
def greedy(request: Request) -> tuple[KeptBlock, ...]:
    """The block whose removal leaves the lowest perplexity is removed, again and again (SLEB, arXiv:2402.09025).

    Every candidate starts from the states that it shares with the current model, and the states of the best candidate
    become those of the next current model: with N blocks, the first and last protected, removing K costs N + Σ_k
    (N−k−2)(N−k−1)/2 block evaluations per batch, k from 0 to K − 1.
    """
    no_criterion(request)
    removable, scored = request.removable(default=1), request.open()
    _check_memory(request, scored)
    present = _Trace.of_whole(scored, request.layers)
    gone: list[int] = []
    tried = sum(len(removable) - number for number in range(request.remove))
    progress = Progress(desc="greedy", total=tried, unit="candidates")
    for _ in range(request.remove):
        best: tuple[float, int, _Trace] | None = None
        for block in removable:
            if block in gone:
                continue
            trace = present.without(scored, block)
            progress.update()
            if best is None or trace.loss < best[0]:
                best = trace.loss, block, trace
        assert best is not None
        gone.append(best[1])
        present = best[2]
    progress.close()
    return without(request.layers, gone)


class _Trace:
    """A model with some blocks removed: the input of every remaining block, and the loss.

    Attributes:
        inputs: input of every remaining block, by its number, [samples, length, hidden], on the host.
        live: numbers of the blocks that remain.
        loss: mean next-token loss on the samples, in nats per token.
    """

    def __init__(self, live: Sequence[int], inputs: dict[int, Tensor]) -> None:
        self.live, self.inputs, self.loss = list(live), inputs, 0.0

    @classmethod
    def of_whole(cls, scored: ScoredModel, layers: int) -> "_Trace":
        trace = cls(range(layers), {})
        trace._walk(scored, start=0)
        return trace

    def without(self, scored: ScoredModel, block: int) -> "_Trace":
        """The trace with one more block removed, computed from that block on."""
        live = [other for other in self.live if other != block]
        trace = _Trace(live, {number: states for number, states in self.inputs.items() if number < block})
        following = next((other for other in live if other > block), None)
        trace._walk(scored, start=block if following is None else following, states=self.inputs[block])
        return trace

    @torch.no_grad()
    def _walk(self, scored: ScoredModel, start: int, states: Tensor | None = None) -> None:
        """Compute from block ``start`` on, whose input is ``states`` (None: the embedding's output)."""
        recorded: dict[int, list[Tensor]] = {number: [] for number in self.live if number >= start}
        loss, count = 0.0, 0
        for first in range(0, len(scored.tokens), scored.batch_size):
            part = slice(first, first + scored.batch_size)
            tokens = scored.tokens[part]

            def visit(number: int, run: RunBlock, x: Tensor, part: slice = part) -> Tensor:
                if number == start and states is not None:
                    x = states[part].to(x.device)
                if number not in recorded:
                    return x
                recorded[number].append(x.cpu())
                return run(x)

            with hooked_blocks(scored.model, visit):
                logits = scored.model(input_ids=tokens, use_cache=False).logits
            losses, counts = token_losses(logits, tokens)
            loss, count = loss + losses.double().sum().item(), count + int(counts.sum())
        self.inputs |= {number: torch.cat(parts) for number, parts in recorded.items()}
        self.loss = loss / count


def _check_memory(request: Request, scored: ScoredModel) -> None:
    """Refuse a selection without enough memory for the states of three models (current, best, tried) at every block."""
    size = next(scored.model.parameters()).element_size()
    needed = 3 * request.layers * scored.tokens.numel() * request.scores.source.hidden * size
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"greedy selection keeps {needed / 1e9:.1f} GB of states and {free / 1e9:.1f} GB are free: take fewer or "
            "shorter samples, or --method iterative --criterion perplexity, which keeps none"
        )
