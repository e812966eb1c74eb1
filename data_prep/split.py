"""Division of documents: those for evaluation, and the sets of the others.

A keyed hash of the text gives every document a rank; ranks below a threshold are for evaluation, and sets divide the
other documents. Equal texts have equal ranks, so they are never in both splits nor in two sets, wherever they are in
the inputs.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from llmprune.data.format import EVAL, TRAIN

_RANKS = 2**64


def rank_of(text: str, seed: int) -> int:
    """The rank of a text: a keyed hash in [0, 2**64)."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big")


def split_of(rank: int, eval_fraction: float, exceptions: Mapping[int, str]) -> str:
    """The split of the documents with a rank: the one in ``exceptions``, otherwise by the threshold."""
    return exceptions.get(rank) or (EVAL if rank < eval_fraction * _RANKS else TRAIN)


def set_of(rank: int, eval_fraction: float, shares: Mapping[str, float]) -> str | None:
    """The set of a document that is not for evaluation; None = it is in no set.

    Args:
        rank: rank of the document, above the threshold.
        eval_fraction: share of the documents below the threshold.
        shares: share of the other documents, by set; the sum is at most 1.
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
    """The ranks that must change their split so that a small domain has samples in both splits.

    The hash fixes shares of documents, not numbers of samples: with few documents, a split may get less than one
    sample. First, if training would have no sample, it gets all documents. Then, if the domain has four samples or more
    and evaluation has none, evaluation gets documents in the order of their ranks, as a larger ``eval_fraction`` would
    do. Documents that would leave training with less than half of the tokens are skipped, so a domain of one document
    has no evaluation sample.

    Args:
        ranks: ranks of all documents of the domain, in any order.
        sizes: number of tokens of each of these documents.
        eval_fraction: wanted share of the documents for evaluation.
        sequence_length: number of tokens per sample.
        fixed: ranks that must stay in the split of the hash.
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
