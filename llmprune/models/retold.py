"""Batches retold with fewer tokens: a token that goes is spelt with tokens that stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmprune.models.causal_lm import Batch, labels_of
from llmprune.models.objectives import IGNORED
from llmprune.models.smaller_tokenizer import Vocabulary


@dataclass(frozen=True)
class Spelling:
    """How text is written with some tokens of a vocabulary.

    Attributes:
        kept: numbers of the tokens that stay, ascending.
        pieces: for every token that goes, the tokens that spell it; empty = it can't be spelt.
    """

    kept: tuple[int, ...]
    pieces: Mapping[int, Sequence[int]]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, kept: tuple[int, ...]) -> "Spelling":
        """The spelling with the tokens ``kept`` of a tokenizer; see ``Vocabulary.cut``."""
        return cls(kept, Vocabulary(tokenizer).pieces(kept))

    @cached_property
    def _numbers(self) -> Tensor:
        """The new number of every token that stays, int64 [largest token + 1]."""
        numbers = torch.zeros(self.kept[-1] + 1, dtype=torch.int64)
        numbers[list(self.kept)] = torch.arange(len(self.kept))
        return numbers

    def retold(self, batch: Batch, longest: int | None = None) -> tuple[Batch, Tensor]:
        """A batch with tokens that stay, in their old numbers; samples become longer, shorter ones are padded.

        The first token of a sample, which nothing predicts, stays unpredicted when it is spelt with several.

        Args:
            batch: tokens, int64 [samples, length], with or without labels and positions.
            longest: number of tokens that the model takes; a sample's end that does not fit is left out; None = any.

        Returns:
            The tokens, labels and, if the batch has them, positions, int64 [samples, new length] each, and the number
            of the given batch's predicted tokens that each sample holds, int64 [samples].
        """
        labels, positions = labels_of(batch).tolist(), batch.get("position_ids")
        rows = []
        for place, tokens in enumerate(batch["input_ids"].tolist()):
            starts = [0] if positions is None else (positions[place] == 0).nonzero().flatten().tolist()
            rows.append(_Row.of(tokens, labels[place], set(starts), self.pieces, longest))
        names = ["input_ids", "labels", *([] if positions is None else ["position_ids"])]
        length, device = max(len(row.input_ids) for row in rows), batch["input_ids"].device
        fill = {"input_ids": self.kept[0], "labels": IGNORED, "position_ids": 0}
        made = {
            name: torch.tensor(
                [getattr(row, name) + [fill[name]] * (length - len(row.input_ids)) for row in rows], device=device
            )
            for name in names
        }
        return made, torch.tensor([row.predicted for row in rows], device=device)

    def renumbered(self, batch: Batch) -> Batch:
        """A retold batch in the new numbers."""
        numbers, labels = self._numbers.to(batch["input_ids"].device), batch["labels"]
        new = torch.where(labels == IGNORED, IGNORED, numbers[labels.clamp(min=0)])
        return {**batch, "input_ids": numbers[batch["input_ids"]], "labels": new}


class _Row:
    """One sample, retold."""

    def __init__(self) -> None:
        self.input_ids: list[int] = []
        self.labels: list[int] = []
        self.position_ids: list[int] = []
        self.predicted = 0

    @classmethod
    def of(
        cls,
        tokens: Sequence[int],
        labels: Sequence[int],
        starts: set[int],
        pieces: Mapping[int, Sequence[int]],
        longest: int | None,
    ) -> "_Row":
        row, position = cls(), 0
        for place, (token, label) in enumerate(zip(tokens, labels, strict=True)):
            spelt = pieces.get(token, (token,))
            if longest is not None and len(row.input_ids) + len(spelt) > longest:
                break
            position = 0 if place in starts else position
            silent = label == IGNORED or place == 0
            row.input_ids += spelt
            row.labels += [IGNORED if silent else piece for piece in spelt]
            row.position_ids += range(position, position + len(spelt))
            position += len(spelt)
            row.predicted += not silent
        return row
