"""The prunable size of a model (its blocks' matrices), expected under gates or counted, and uniform shapes."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.models.families import Shape
from llmprune.pruning.gates.kinds import ATTENTION, DEPTH, HEAD, HIDDEN, INTERMEDIATE, KV_GROUP, LAYER, MLP, gate_sizes

RIVALS = 6  # largest number of uniform shapes that are compared


def prunable_size(source: Shape, matrices: Mapping[str, int], keep: Mapping[str, Tensor]) -> Tensor:
    """The number of attention and MLP parameters that stay, [].

    A matrix element stays with the product of the probabilities of all gates that affect it (gates are independent), so
    the expectation over gates is the same formula as the count for one sample of the gates.

    Args:
        source: shape of the model.
        matrices: number of matrices of each kind in a block (``Family.matrices``).
        keep: keep probabilities (or the gates themselves, 0 or 1) by kind, of the kind's size; absent = 1.
    """
    sizes = gate_sizes(source)
    device = next(iter(keep.values())).device
    p = {kind: keep.get(kind, torch.ones(size, device=device)) for kind, size in sizes.items()}
    hidden = p[HIDDEN].sum()
    groups = p[KV_GROUP].sum(1) * source.head_dim
    queries = (p[KV_GROUP][..., None] * p[HEAD]).sum((1, 2)) * source.head_dim
    of_attention = matrices["query"] * queries + matrices["key_value"] * groups
    of_mlp = matrices["channel"] * p[INTERMEDIATE].sum(1)
    return (p[LAYER] * (p[ATTENTION] * of_attention + p[MLP] * of_mlp)).sum() * hidden


def uniform_counts(
    source: Shape,
    matrices: Mapping[str, int],
    keep: Mapping[str, Tensor],
    sparsity: float,
    multiples: Mapping[str, int],
    coupled: bool = False,
    whole_heads: bool = False,
) -> list[dict[str, int]]:
    """The uniform shapes of the target size that are nearest to the learned gates, the best first.

    Every kind is reduced in proportion to its expected share of closed gates: the counts move along the direction of
    these shares until the size is reached. So a kind whose gates are all open loses almost nothing while another can be
    reduced. Around that point counts are rounded to both sides, and MLP channels, or else hidden dimensions, are chosen
    last to reach the size (to 1 % where that is possible).

    Args:
        source: shape of the model.
        matrices: number of matrices of each kind in a block, see ``prunable_size``.
        keep: keep probabilities of every kind of gate that exists.
        sparsity: share of the prunable size to remove.
        multiples: numbers that the counts must be multiples of, by kind; absent = 1.
        coupled: whether hidden must be key/value groups × head size.
        whole_heads: whether hidden must be a multiple of the heads.

    Returns:
        The number of gates that stay in every row, by kind, for each of at most ``RIVALS`` shapes.
    """
    full = _full(source)
    wanted = (1 - sparsity) * _size(source, matrices, full)
    ties = _Ties(multiples, source.head_dim if coupled and HIDDEN in keep else None, whole_heads)
    closed = {kind: 1 - _mean_count(kind, keep) / full[kind] for kind in keep}
    if ties.hidden_per_group is not None:
        closed[HIDDEN] = closed[KV_GROUP] = (closed[HIDDEN] + closed[KV_GROUP]) / 2
    centre = _at_size(source, matrices, closed, wanted)
    solved = next((kind for kind in (INTERMEDIATE, HIDDEN) if kind in keep and not ties.fixes(kind)), None)
    found: list[tuple[float, float, dict[str, int]]] = []
    for shape in _near(centre, [kind for kind in keep if kind != solved], full, ties):
        if solved is not None:
            multiple = ties.multiple(solved, {**full, **shape})
            shape[solved] = _solve(source, matrices, {**full, **shape}, solved, wanted, multiple)
        error = abs(_size(source, matrices, {**full, **shape}) / wanted - 1)
        change = sum(abs(shape[kind] - centre[kind]) / full[kind] for kind in keep)
        found.append((round(error, 2), change, shape))
    found.sort(key=lambda one: one[:2])
    return [shape for error, _, shape in found if error <= max(found[0][0], 0.01)][:RIVALS]


@dataclass(frozen=True)
class _Ties:
    """Conditions that the counts must satisfy.

    Attributes:
        multiples: numbers that the counts must be multiples of, by kind; absent = 1.
        hidden_per_group: number of hidden dimensions for each key/value group; None = the two counts are independent.
        whole_heads: whether hidden must be a multiple of the heads.
    """

    multiples: Mapping[str, int]
    hidden_per_group: int | None
    whole_heads: bool

    def fixes(self, kind: str) -> bool:
        """Whether the count of a kind is determined by the other counts."""
        return kind == HIDDEN and self.hidden_per_group is not None

    def multiple(self, kind: str, counts: Mapping[str, int]) -> int:
        """The number that the count of a kind must be a multiple of, given the other kinds' counts."""
        own = self.multiples.get(kind, 1)
        return math.lcm(own, counts[KV_GROUP] * counts[HEAD]) if kind == HIDDEN and self.whole_heads else own

    def groups(self, wanted: float, limit: int) -> list[int]:
        """The two numbers of key/value groups nearest to ``wanted`` with which hidden is a valid multiple."""
        assert self.hidden_per_group is not None
        multiple = self.multiples.get(HIDDEN, 1)
        fitting = [n for n in range(1, limit + 1) if n * self.hidden_per_group % multiple == 0]
        return sorted(fitting, key=lambda n: abs(n - wanted))[:2] or [limit]


def _near(
    centre: Mapping[str, float], kinds: Sequence[str], full: Mapping[str, int], ties: _Ties
) -> Iterator[dict[str, int]]:
    """The counts of ``kinds`` around ``centre``, in all combinations that ``ties`` allow."""
    tried = [kind for kind in kinds if kind != HIDDEN]  # these determine the possible counts of hidden
    candidates = [
        ties.groups(centre[kind], full[kind])
        if kind == KV_GROUP and ties.hidden_per_group is not None
        else _around(centre[kind], ties.multiples.get(kind, 1), full[kind])
        for kind in tried
    ]
    for counts in itertools.product(*candidates):
        chosen = dict(zip(tried, counts, strict=True))
        if HIDDEN not in kinds:
            yield chosen
        elif ties.hidden_per_group is not None:
            yield {**chosen, HIDDEN: chosen[KV_GROUP] * ties.hidden_per_group}
        else:
            multiple = ties.multiple(HIDDEN, {**full, **chosen})
            yield from ({**chosen, HIDDEN: count} for count in _around(centre[HIDDEN], multiple, full[HIDDEN]))


def _full(source: Shape) -> dict[str, int]:
    """The number of gates in a row, by kind: the counts of the unpruned model."""
    return {kind: size[-1] for kind, size in gate_sizes(source).items()}


def _at_size(
    source: Shape, matrices: Mapping[str, int], closed: Mapping[str, float], wanted: float
) -> dict[str, float]:
    """The counts, not yet whole numbers, with the size ``wanted``, along the direction of ``closed``.

    Args:
        source: shape of the model.
        matrices: number of matrices of each kind in a block, see ``prunable_size``.
        closed: expected share of zero gates, by kind, in (0, 1).
        wanted: prunable size to reach.
    """
    full = _full(source)

    def at(step: float) -> dict[str, float]:
        return {kind: max(full[kind] * (1 - step * share), 1.0) for kind, share in closed.items()}

    low, high = 0.0, 1 / max(min(closed.values()), 1e-9)  # at ``high`` every count is at its minimum
    for _ in range(100):
        middle = (low + high) / 2
        if _size(source, matrices, {**full, **at(middle)}) > wanted:
            low = middle
        else:
            high = middle
    return at(high)


def _size(source: Shape, matrices: Mapping[str, int], counts: Mapping[str, float]) -> float:
    """The prunable size of a uniform shape; its counts may be fractions."""
    head_dim, groups = source.head_dim, counts[KV_GROUP]
    queries = groups * counts[HEAD] * head_dim
    of_attention = matrices["query"] * queries + matrices["key_value"] * groups * head_dim
    of_mlp = matrices["channel"] * counts[INTERMEDIATE]
    attentions, mlps = (min(counts[LAYER], counts[kind]) for kind in (ATTENTION, MLP))
    return (attentions * of_attention + mlps * of_mlp) * counts[HIDDEN]


def _mean_count(kind: str, keep: Mapping[str, Tensor]) -> float:
    """The expected number of gates of a row that stay, averaged over the blocks that are likely to stay."""
    counts = keep[kind].sum(-1)
    if kind in DEPTH or counts.ndim == 0:
        return counts.item()
    sublayer = MLP if kind == INTERMEDIATE else ATTENTION
    ones = torch.ones(counts.shape[0], device=counts.device)
    weight = keep.get(LAYER, ones) * keep.get(sublayer, ones)
    counts = counts.flatten(1).mean(1) if counts.ndim > 1 else counts
    return ((counts * weight).sum() / weight.sum()).item()


def _around(value: float, multiple: int, limit: int) -> list[int]:
    """The multiples nearest to ``value`` on both sides, between one and ``limit``."""
    near = math.floor(value / multiple) * multiple
    return sorted(n for n in {near, near + multiple} if 0 < n <= limit) or [limit]


def _solve(
    source: Shape, matrices: Mapping[str, int], counts: Mapping[str, int], kind: str, wanted: float, multiple: int
) -> int:
    """The count of ``kind`` with the size nearest to ``wanted``; the size is linear in this count."""
    limit = counts[kind]
    zero, one = (_size(source, matrices, {**counts, kind: n}) for n in (0, 1))
    exact = (wanted - zero) / (one - zero)
    largest = limit // multiple * multiple or limit
    return int(min(max(round(exact / multiple) * multiple, min(multiple, largest)), largest))
