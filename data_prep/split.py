"""Which documents are kept for evaluation, and which set each of the others belongs to.

A keyed hash of the text ranks every document; those below a threshold are for evaluation, and sets divide the others.
Equal texts have equal ranks, so they are never on both sides nor in two sets, wherever they stand in the inputs.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from llmprune.data.format import EVAL, TRAIN

_RANKS = 2**64


def rank_of(text: str, seed: int) -> int:
    """The place of a text among all texts, in [0, 2**64)."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big")


def split_of(rank: int, eval_fraction: float, exceptions: Mapping[int, str]) -> str:
    """The split of the documents of a rank: ``exceptions`` first, else the threshold."""
    return exceptions.get(rank) or (EVAL if rank < eval_fraction * _RANKS else TRAIN)


def set_of(rank: int, eval_fraction: float, shares: Mapping[str, float]) -> str | None:
    """The set of a document that is not for evaluation; None = it is in none.

    Args:
        rank: of the document, beyond the threshold.
        eval_fraction: share of the documents that lies below it.
        shares: of the others by set, at most 1 in all.
    """
    place = (rank / _RANKS - eval_fraction) / (1 - eval_fraction)
    for name, share in shares.items():
        if place < share:
            return name
        place -= share
    return None


def exceptions_for(
    ranks: Sequence[int],
    sizes: Sequence[int],
    eval_fraction: float,
    sequence_length: int,
    fixed: Collection[int] = (),
) -> dict[int, str]:
    """The ranks that must change sides for a small domain to have samples in both splits.

    The hash knows shares, not samples: with few documents, a side may get less than one sample. First, training takes
    everything if its share alone makes no sample. Then, if the domain holds four samples or more and evaluation has
    none, evaluation takes documents by rising rank, which is what a larger ``eval_fraction`` would do. Documents that
    would leave training with less than half of the tokens are passed over, so a domain of one document has none.

    Args:
        ranks: of all documents of the domain, in any order.
        sizes: their tokens.
        eval_fraction: share of the documents that is wanted for evaluation.
        sequence_length: tokens per sample.
        fixed: ranks that must stay where the hash puts them.
    """
    tokens: Counter[int] = Counter()
    for rank, size in zip(ranks, sizes, strict=True):
        tokens[rank] += size
    total = tokens.total()
    exceptions: dict[int, str] = {}
    chosen = [rank for rank in tokens if split_of(rank, eval_fraction, {}) == EVAL]
    held_out = sum(tokens[rank] for rank in chosen)
    if total - held_out < sequence_length:
        movable = [rank for rank in chosen if rank not in fixed]
        exceptions = dict.fromkeys(movable, TRAIN)
        held_out -= sum(tokens[rank] for rank in movable)
    if held_out < sequence_length and total >= 4 * sequence_length:
        moved = {}
        for rank in sorted(tokens):
            in_training = split_of(rank, eval_fraction, exceptions) == TRAIN
            if in_training and rank not in fixed and 2 * (held_out + tokens[rank]) <= total:
                moved[rank] = EVAL
                held_out += tokens[rank]
            if held_out >= sequence_length:
                return exceptions | moved
    return exceptions
