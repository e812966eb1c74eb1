"""Merging of neighbouring blocks (LaCo, arXiv:2402.11187)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmprune.models.block_hooks import RunBlock, hooked_blocks, shortened
from llmprune.models.families import family_of
from llmprune.plans.plan import KeptBlock
from llmprune.pruning.selection.methods import SELECTIONS, Request, ScoredModel, no_criterion
from llmprune.utils.errors import UserError
from llmprune.utils.progress import Progress

Mixture = dict[int, float]


@SELECTIONS.register("merge")
def merge(request: Request) -> tuple[KeptBlock, ...]:
    """Neighbouring blocks become one, θ + Σ (θ' − θ), while the final hidden states stay similar enough.

    Merging proceeds from the end to the start, ``merge_size`` blocks at a time. A merge is kept if the mean cosine
    between the states before the final norm and those of the whole model is at least ``threshold``. ``remove``, if
    given, is the largest number of blocks to remove.
    """
    config = request.config
    no_criterion(request)
    if config.merge_size < 2 or config.merge_step < 1 or not -1 <= config.threshold <= 1:
        raise UserError(
            "merging needs a merge_size of at least 2, a merge_step of at least 1 and a threshold in [-1, 1]"
        )
    removable = request.removable(default=1)
    if config.merge_size > len(removable):
        raise UserError(f"merge_size is {config.merge_size}, but only {len(removable)} blocks can be merged")
    most = request.layers - 1 if config.remove is None else request.remove
    scored = request.open()
    reference = _final_states(scored)
    mixtures: list[Mixture] = [{block: 1.0} for block in range(request.layers)]
    live = list(range(request.layers))
    first, last = removable[0], removable[-1]
    place = len(live) - config.merge_size
    progress = Progress(desc="merging", unit="merges tried")
    while place >= 0:
        members = [p for p in range(place, min(place + config.merge_size, len(live))) if first <= live[p] <= last]
        members = members[: most - (request.layers - len(live)) + 1]
        if len(members) < 2 or members[0] != place:
            place -= 1
            continue
        merged = _mixture([mixtures[live[p]] for p in members])
        rest = [block for p, block in enumerate(live) if p not in members[1:]]
        with _merged_weights(scored, [live[p] for p in members]) as keep:
            with shortened(scored.model, rest):
                alike = _mean_cosine(_final_states(scored), reference)
            if accepted := alike >= config.threshold:
                keep()
        progress.update()
        if accepted:
            mixtures[live[place]] = merged
            live = rest
        place = min(place - (config.merge_step if accepted else 1), len(live) - config.merge_size)
    progress.close()
    if len(live) == request.layers:
        raise UserError(f"no merge keeps a mean cosine of {config.threshold}: lower --threshold or --merge-size")
    return tuple(_kept(block, mixtures[block]) for block in live)


def _kept(block: int, mixture: Mixture) -> KeptBlock:
    """A block of the merged model, with the place and the kind of attention of the source's block."""
    if mixture == {block: 1.0}:
        return KeptBlock.whole(block)
    return KeptBlock(block, block, merge=tuple(sorted(mixture.items())))


def _mixture(parts: list[Mixture]) -> Mixture:
    """The weights of the source's blocks in θ_1 + Σ (θ_k − θ_1)."""
    found: Mixture = {}
    for number, part in enumerate(parts):
        weight = 1.0 if number else 2.0 - len(parts)
        for block, share in part.items():
            found[block] = found.get(block, 0.0) + weight * share
    return {block: weight for block, weight in found.items() if weight}


@contextmanager
def _merged_weights(scored: ScoredModel, members: list[int]) -> Iterator[Callable[[], None]]:
    """While open, the first block is merged with the others; undone at the end unless the function is called."""
    blocks = scored.model.get_submodule(family_of(scored.model.config).blocks)
    assert isinstance(blocks, nn.ModuleList)
    first, *others = (dict(blocks[member].named_parameters()) for member in members)
    before = {name: parameter.detach().clone() for name, parameter in first.items()}
    kept: list[bool] = []
    with torch.no_grad():
        for name, parameter in first.items():
            total = before[name].float() * (1 - len(others))
            for other in others:
                total += other[name].float()
            parameter.copy_(total)
        try:
            yield lambda: kept.append(True)
        finally:
            if not kept:
                for name, parameter in first.items():
                    parameter.copy_(before[name])


@torch.no_grad()
def _final_states(scored: ScoredModel) -> Tensor:
    """The last block's output before the final norm, [samples, length, hidden], on the host."""
    found: list[Tensor] = []
    last = len(list(scored.model.get_submodule(family_of(scored.model.config).blocks).children())) - 1

    def visit(number: int, run: RunBlock, states: Tensor) -> Tensor:
        after = run(states)
        if number < last:
            return after
        found.append(after.cpu())
        return after[:1, :1]

    with hooked_blocks(scored.model, visit):
        for tokens in scored.tokens.split(scored.batch_size):
            scored.model(input_ids=tokens, use_cache=False)
    return torch.cat(found)


def _mean_cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.float(), b.float(), dim=-1).mean().item()
