"""Perplexity of text, in the modes that differ between papers.

The text is one stream of tokens, divided into segments. If the stride is shorter than the segment, every segment after
the first scores only the tokens that the previous segment did not contain, so tokens have more context. If the stride
equals the segment, which is the common choice, segments do not overlap. A BOS is placed before the whole text
(``once``), before each segment (``each``; a segment then has one more token) or nowhere (``none``). Batches contain
segments of equal length, so there is no padding.
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
    """Settings for the measurement of perplexity.

    Attributes:
        segment: number of tokens of a segment, without a BOS of its own.
        stride: number of tokens from the start of one segment to the start of the next; None = segment.
        bos: modes of placing a BOS: ``none``, ``once``, ``each``; each mode is measured separately.
        text_field: field of a JSON record that contains the text.
        samples_per_domain: largest number of samples per domain of prepared data; None = all.
    """

    segment: int = 128
    stride: int | None = None
    bos: Sequence[str] = field(default=("once", "each"))
    text_field: str = "text"
    samples_per_domain: int | None = None

    def check(self) -> None:
        """Raise ``UserError`` for values that are out of range."""
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
    """The result of a measurement.

    Attributes:
        loss: mean negative log-likelihood, in nats per token.
        tokens: number of predicted tokens.
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
    """Read the token streams in files and folders, int64 [tokens] each, by name.

    A text file gives one stream: its documents in order, with an EOS between them; its name is the file's name without
    the suffix. Prepared data give one stream per domain's evaluation split, with the name FOLDER/DOMAIN. If two streams
    would have the same name, their names are the whole paths.

    Raises:
        UserError: data can't be read, are empty, or were made with another tokenizer.
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
    """The streams of one path by domain; the domain of a text is the empty string."""
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
    """Raise ``UserError`` if a model can't read streams: no BOS, segments too long, tokens outside its vocabulary."""
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
    """Measure the perplexity of a stream.

    Args:
        model: any causal LM.
        tokens: token stream, int64 [tokens], at least 2 tokens; see ``check_streams``.
        config: segment length and stride.
        mode: mode of placing a BOS: ``none``, ``once`` or ``each``.
        bos: id of the BOS token; None = there is none.
        batch_size: number of segments per forward pass.
        forward: function from tokens to logits; None = the model's own forward pass.
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
    """Batches of segments of equal length, with labels that score every token at most once.

    Args:
        tokens: token stream, int64 [tokens].
        config: segment length and stride.
        bos: id of a BOS token to place before each segment; None = no BOS.
        batch_size: number of segments per batch.

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
    """Segments of a stream, each with the number of its tokens that are scored before; the last may be shorter."""
    reached = 0
    for start in range(0, len(tokens), stride):
        segment = tokens[start : start + length]
        yield segment, reached - start
        reached = start + len(segment)
        if reached == len(tokens):
            return
