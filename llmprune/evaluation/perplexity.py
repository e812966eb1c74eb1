"""Perplexity of text, in the modes that papers differ by.

The text is one stream of tokens, cut into segments. With a stride shorter than the segment every segment after the
first scores only what the one before did not reach, so that tokens have more context; with stride = segment, the
common choice, segments stand alone. A BOS is put before the whole text (``once``), before each segment (``each``, which
then has a token more) or nowhere (``none``). Segments of equal length form batches, so nothing is ever padded.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.data.dataset import EvalDataset
from llmprune.data.format import DataManifest, tokenizer_fingerprint
from llmprune.data.sources import Document, Fields, documents, find_files
from llmprune.errors import UserError, nearest
from llmprune.models.causal_lm import IGNORED, token_losses

BOS_MODES = ("none", "once", "each")


@dataclass(frozen=True)
class PerplexityConfig:
    """How perplexity is measured.

    Attributes:
        segment: tokens of a segment, without a BOS of its own.
        stride: tokens from the start of one segment to that of the next; None = segment.
        bos: modes, each measured apart: ``none``, ``once``, ``each``.
        text_field: the field of a JSON record that holds the text.
        samples_per_domain: of prepared data, at most so many samples of each domain; None = all.
    """

    segment: int = 128
    stride: int | None = None
    bos: Sequence[str] = field(default=("once", "each"))
    text_field: str = "text"
    samples_per_domain: int | None = None

    def check(self) -> None:
        """Raise ``UserError`` for what can't be."""
        if self.segment < 2:
            raise UserError(f"a segment needs at least 2 tokens; got {self.segment}")
        if self.stride is not None and not 1 <= self.stride <= self.segment:
            raise UserError(f"the stride must lie between 1 and the segment's {self.segment} tokens; got {self.stride}")
        for mode in self.bos:
            if mode not in BOS_MODES:
                raise UserError(f"there is no BOS mode '{mode}'; {nearest(mode, BOS_MODES)}")


@dataclass(frozen=True)
class Perplexity:
    """What was measured.

    Attributes:
        loss: mean negative log-likelihood, nats per token.
        tokens: how many tokens were predicted.
    """

    loss: float
    tokens: int

    @property
    def value(self) -> float:
        """The exponential of the mean loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def read_tokens(path: str, tokenizer: PreTrainedTokenizerBase, config: PerplexityConfig) -> dict[str, Tensor]:
    """The token streams in ``path``, int64 [tokens] each, by name.

    Text gives one stream, its documents one after the other with an EOS between them. Prepared data give one stream
    for each domain's evaluation split, named ``NAME/DOMAIN``.

    Raises:
        UserError: the data can't be read or are of another tokenizer.
    """
    name = Path(path).name.partition(".")[0] or path
    if (Path(path) / "manifest.json").is_file():
        if tokenizer_fingerprint(tokenizer) != DataManifest.load(path).tokenizer:
            raise UserError(f"the model's tokenizer did not make the data in {path}: prepare the data with it")
        dataset = EvalDataset(path, config.samples_per_domain)
        streams: dict[str, list[Tensor]] = {}
        for place in range(len(dataset)):
            sample = dataset[place]
            streams.setdefault(f"{name}/{dataset.domains[int(sample['domain'])]}", []).append(sample["input_ids"])
        return {stream: torch.cat(samples) for stream, samples in streams.items()}
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for document in documents(find_files([Path(path)]), Fields(config.text_field)):
        if not isinstance(document, Document):
            raise UserError(f"{document.place} can't be read: {document.reason}")
        tokens += (end if tokens else []) + tokenizer(document.text, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
    return {name: torch.tensor(tokens)}


def measure_perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    config: PerplexityConfig,
    mode: str,
    *,
    bos: int | None,
    batch_size: int,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Perplexity:
    """The perplexity of a stream.

    Args:
        model: any causal LM.
        tokens: int64 [tokens].
        config: segments and stride.
        mode: where a BOS is put.
        bos: the BOS token.
        batch_size: segments per forward pass.
        forward: from tokens to logits; default: the model's own.

    Raises:
        UserError: the text is too short, or the segments too long for the model.
    """
    if mode != "none":
        if bos is None:
            raise UserError("this tokenizer has no BOS (and no EOS in its place): measure with --bos none")
        if mode == "once":
            tokens = torch.cat([torch.tensor([bos]), tokens])
    if len(tokens) < 2:
        raise UserError("there is no text to measure perplexity on")
    limit, longest = getattr(model.config, "max_position_embeddings", None), config.segment + (mode == "each")
    if limit is not None and longest > limit:
        raise UserError(f"segments of {longest} tokens are too long: the model takes {limit}")
    if (largest := int(tokens.max())) >= model.config.vocab_size:
        raise UserError(
            f"the text has the token {largest}, the model's vocabulary ends at {model.config.vocab_size - 1}"
        )
    run = forward or (lambda inputs: model(input_ids=inputs, use_cache=False).logits)
    losses = torch.zeros((), dtype=torch.float64)
    count = 0
    for inputs, labels in batches(tokens, config, bos if mode == "each" else None, batch_size):
        with torch.no_grad():
            logits = run(inputs.to(model.device))
            loss, number = token_losses(logits, labels.to(logits.device))
        losses += loss.double().sum().cpu()
        count += int(number.sum())
    return Perplexity((losses / count).item(), count)


def batches(
    tokens: Tensor, config: PerplexityConfig, bos: int | None, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Segments of one length each, with labels that score every token at most once.

    Args:
        tokens: int64 [tokens].
        config: segments and stride.
        bos: put before each segment, if given.
        batch_size: segments in a batch.

    Yields:
        Inputs and labels, int64 [≤ batch size, length].
    """
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    for segment, unscored in segments(tokens, config.segment, config.stride or config.segment):
        if bos is not None:
            segment, unscored = F.pad(segment, (1, 0), value=bos), unscored + 1
        if inputs and len(segment) != len(inputs[0]):
            yield torch.stack(inputs), torch.stack(labels)
            inputs, labels = [], []
        inputs.append(segment)
        labels.append(segment.clone())
        labels[-1][:unscored] = IGNORED
        if len(inputs) == batch_size:
            yield torch.stack(inputs), torch.stack(labels)
            inputs, labels = [], []
    if inputs:
        yield torch.stack(inputs), torch.stack(labels)


def segments(tokens: Tensor, length: int, stride: int) -> Iterator[tuple[Tensor, int]]:
    """Segments of a stream, the last one as long as is left, and how many of its first tokens are scored before it."""
    reached = 0
    for start in range(0, len(tokens), stride):
        segment = tokens[start : start + length]
        yield segment, reached - start
        reached = start + len(segment)
        if reached == len(tokens):
            return


def bos_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands before a text: BOS, or EOS where a tokenizer has no BOS (as in lm-eval)."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
