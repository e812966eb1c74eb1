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
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmprune.data.dataset import EvalDataset
from llmprune.data.format import tokenizer_fingerprint
from llmprune.data.prepared import PreparedData
from llmprune.data.records import find_inputs
from llmprune.data.sources import Document, Fields, documents
from llmprune.models.causal_lm import token_losses
from llmprune.models.loaded import check_vocabulary
from llmprune.models.objectives import IGNORED
from llmprune.models.source import longest_input
from llmprune.utils.errors import UserError, nearest

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
        if not self.bos:
            raise UserError(f"name at least one BOS mode: {', '.join(BOS_MODES)}")
        if self.samples_per_domain is not None and self.samples_per_domain < 1:
            raise UserError(f"samples_per_domain is {self.samples_per_domain}; it must be positive")
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
        return math.inf if self.loss > 700 else math.exp(self.loss)


def read_streams(
    paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: PerplexityConfig
) -> dict[str, Tensor]:
    """The token streams in files and folders, int64 [tokens] each, by name.

    Text gives one stream, its documents one after the other with an EOS between them, named as its file is without the
    ending. Prepared data give one stream for each domain's evaluation split, named FOLDER/DOMAIN. Where that would name
    two streams alike, they are named by their whole paths.

    Raises:
        UserError: data can't be read, hold nothing, or are of another tokenizer.
    """
    read = {path: _read(Path(path), tokenizer, config) for path in paths}
    short = {path: (Path(path).resolve().name if Path(path).is_dir() else Path(path).stem) for path in read}
    streams = {}
    for path, found in read.items():
        name = path if list(short.values()).count(short[path]) > 1 else short[path]
        for domain, tokens in found.items():
            if len(tokens) < 2:
                raise UserError(f"there is no text in {path} to measure perplexity on")
            streams["/".join(filter(None, (name, domain)))] = tokens
    return streams


def _read(path: Path, tokenizer: PreTrainedTokenizerBase, config: PerplexityConfig) -> dict[str, Tensor]:
    """The streams in one place by domain; a text's has no name."""
    if (path / "manifest.json").is_file():
        data = PreparedData(path)
        if tokenizer_fingerprint(tokenizer) != data.manifest.tokenizer:
            raise UserError(f"the model's tokenizer did not make the data in {path}: prepare the data with it")
        if data.manifest.conversations:
            raise UserError(f"{path} holds conversations, which make no running text: give text or other data")
        dataset = EvalDataset(data, config.samples_per_domain)
        streams: dict[str, list[Tensor]] = {}
        for place in range(len(dataset)):
            sample = dataset[place]
            streams.setdefault(dataset.domains[int(sample["domain"])], []).append(sample["input_ids"])
        return {domain: torch.cat(samples) for domain, samples in streams.items()}
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for document in documents(find_inputs([path]), Fields(config.text_field)):
        if not isinstance(document, Document):
            raise UserError(f"{document.place} can't be read: {document.reason}")
        tokens += (end if tokens else []) + tokenizer(document.text, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
    return {"": torch.tensor(tokens, dtype=torch.int64)}


def check_streams(
    streams: dict[str, Tensor], config: PerplexityConfig, model: PretrainedConfig, bos: int | None
) -> None:
    """Raise ``UserError`` if a model can't read these streams: no BOS, segments too long, tokens that it lacks."""
    if bos is None and any(mode != "none" for mode in config.bos):
        raise UserError("this tokenizer has no BOS (and no EOS in its place): measure with --bos none")
    limit, each = longest_input(model), "each" in config.bos
    if streams and limit is not None and config.segment + each > limit:
        more = " and the BOS before each" if each else ""
        raise UserError(f"segments of {config.segment} tokens{more} are too long: the model takes {limit}")
    for name, tokens in streams.items():
        check_vocabulary(int(tokens.max()), model, name)


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
        tokens: int64 [tokens], at least 2; see ``check_streams``.
        config: segments and stride.
        mode: where a BOS is put.
        bos: the BOS token.
        batch_size: segments per forward pass.
        forward: from tokens to logits; default: the model's own.
    """
    if mode == "once":
        tokens = torch.cat([torch.tensor([bos]), tokens])
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
