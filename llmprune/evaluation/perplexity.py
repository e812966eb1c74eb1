"""Perplexity of text, in the modes that differ between papers.

The text is one stream of tokens, divided into segments. If the stride is shorter than the segment, every segment after
the first scores only the tokens that the previous segment did not contain, so tokens have more context. If the stride
equals the segment, which is the common choice, segments do not overlap. A BOS is placed before the whole text
(``once``), before each segment (``each``; a segment then has one more token) or nowhere (``none``). The last segment
may be shorter; the code of Shortened LLaMA leaves it out (``like``). Batches contain segments of equal length, so there
is no padding.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from llmprune.evaluation.settings import LONGEST_SEGMENT, BosMode, PerplexityConfig
from llmprune.models.causal_lm import token_losses
from llmprune.models.loaded import check_vocabulary
from llmprune.models.objectives import IGNORED
from llmprune.models.source import longest_input
from llmprune.utils.errors import UserError
from llmprune.utils.progress import Progress

SHORTENED_SEGMENT = 128  # of Shortened LLaMA's eval_ppl.py, which measures both modes in SHORTENED_BOS
SHORTENED_BOS: tuple[BosMode, ...] = ("once", "each")


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

    def bits_per_byte(self, tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> float:
        """The mean loss in bits per byte of the text, with which models of different tokenizers can be compared.

        The few tokens without a prediction count as if they had the mean loss.

        Args:
            tokens: stream that was measured, int64 [tokens].
            tokenizer: tokenizer of the stream.
        """
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return self.loss * len(tokens) / (math.log(2) * max(len(text.encode("utf-8")), 1))


@dataclass(frozen=True)
class Segmentation:
    """How streams are cut into segments, and where a BOS is put.

    Attributes:
        length: number of tokens of a segment, without a BOS of its own.
        stride: number of tokens from the start of one segment to the start of the next.
        bos: BOS modes to measure.
        whole: whether only segments of the full length count.
    """

    length: int
    stride: int
    bos: Sequence[BosMode] = ("none",)
    whole: bool = False


def segmentations(
    config: PerplexityConfig, models: Sequence[tuple[PretrainedConfig, PreTrainedTokenizerBase]]
) -> list[Segmentation]:
    """The segmentation for each of several models, with what ``config`` leaves open.

    Segments have the same length for all models, as perplexities over different segments can't be compared.

    Args:
        config: settings of perplexity.
        models: config and tokenizer of each model.

    Raises:
        UserError: the stride is longer than the segment.
    """
    modes = [tuple(config.bos or _usual_bos(config, tokenizer)) for _, tokenizer in models]
    length = config.segment
    if length is None:
        limits = [
            (longest_input(model) or math.inf) - ("each" in bos) for (model, _), bos in zip(models, modes, strict=True)
        ]
        length = int(min(SHORTENED_SEGMENT if config.like == "shortened" else LONGEST_SEGMENT, *limits))
    stride = config.stride or length
    if stride > length:
        raise UserError(f"the stride must be at most the segment's {length:,} tokens; got {stride:,}")
    return [Segmentation(length, stride, bos, whole=config.like == "shortened") for bos in modes]


def _usual_bos(config: PerplexityConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[BosMode, ...]:
    """The BOS modes that are measured unless others are asked for."""
    if config.like == "shortened":
        return SHORTENED_BOS
    return ("once",) if adds_bos(tokenizer) else ("none",)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts a BOS before the tokens of a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def read_streams(
    paths: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: PerplexityConfig
) -> dict[str, Tensor]:
    """Read the token streams in files and folders, int64 [tokens] each, by name.

    A text file gives one stream: its documents in order, with an EOS between them; its name is the file's name without
    the suffix. Prepared data give one stream per domain's evaluation split, with the name FOLDER/DOMAIN. If two streams
    would have the same name, their names are the whole paths. A stream ends after ``config.tokens`` tokens.

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
            streams["/".join(filter(None, (name, domain)))] = tokens[: config.tokens]
    return streams


def _read(path: Path, tokenizer: PreTrainedTokenizerBase, config: PerplexityConfig) -> dict[str, Tensor]:
    """The streams of one path by domain; the domain of a text is the empty string."""
    if (path / "manifest.json").is_file():
        return _read_prepared(path, tokenizer, config)
    read = _joined_tokens if config.like == "shortened" else _document_tokens
    return {"": torch.tensor(read(path, tokenizer, config), dtype=torch.int64)}


def _read_prepared(path: Path, tokenizer: PreTrainedTokenizerBase, config: PerplexityConfig) -> dict[str, Tensor]:
    """The evaluation splits of prepared data, by domain."""
    data = PreparedData(path)
    if tokenizer_fingerprint(tokenizer) != data.manifest.tokenizer:
        raise UserError(f"the model's tokenizer did not make the data in {path}: prepare the data with it")
    if data.manifest.conversations:
        raise UserError(f"{path} holds conversations, which make no running text: give text or other data")
    if config.like == "shortened":
        raise UserError(f"{path} holds tokens, and --like shortened joins the lines of a text: give the text itself")
    dataset = EvalDataset(data, config.samples_per_domain)
    streams: dict[str, list[Tensor]] = {}
    for place in range(len(dataset)):
        sample = dataset[place]
        streams.setdefault(dataset.domains[int(sample["domain"])], []).append(sample["input_ids"])
    return {domain: torch.cat(samples) for domain, samples in streams.items()}


def _document_tokens(path: Path, tokenizer: PreTrainedTokenizerBase, config: PerplexityConfig) -> list[int]:
    """The tokens of all documents with an EOS between them, or of as many documents as have ``config.tokens``."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens: list[int] = []
    for text, _ in _texts(path, config, empty=False):
        tokens += (end if tokens else []) + _encode(text, tokenizer)
        if config.tokens is not None and len(tokens) >= config.tokens:
            break
    return tokens


def _joined_tokens(path: Path, tokenizer: PreTrainedTokenizerBase, config: PerplexityConfig) -> list[int]:
    """The tokens of all records joined by blank lines, as the code of Shortened LLaMA joins a data set's rows.

    The records of a text file are its lines, with their ends; a line of spaces alone is an empty record, as in the data
    set WikiText-2 (raw).
    """
    rows: list[str] = []
    for text, is_text in _texts(path, config, empty=True):
        if is_text:
            rows += [line if line.strip() else "" for line in io.StringIO(text, newline=None)]
        else:
            rows.append(text)
    return _encode("\n\n".join(rows), tokenizer)


def _texts(path: Path, config: PerplexityConfig, *, empty: bool) -> Iterator[tuple[str, bool]]:
    """The texts of all documents of a file or a folder, each with whether it is a whole text file.

    Args:
        path: file or folder.
        config: settings of perplexity.
        empty: whether documents without text are returned as well.
    """
    inputs = find_inputs([path])
    for document in documents(inputs, Fields(config.text_field), empty=empty):
        if not isinstance(document, Document):
            raise UserError(f"{document.place} can't be read: {document.reason}")
        yield document.text, inputs[document.place[0]].is_text


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]


def check_streams(
    streams: dict[str, Tensor], segmentation: Segmentation, model: PretrainedConfig, bos: int | None
) -> None:
    """Check that a model can read streams.

    Args:
        streams: streams by name; see ``read_streams``.
        segmentation: segments and BOS modes.
        model: config of the model.
        bos: id of the BOS token; None = there is none.

    Raises:
        UserError: a mode needs a BOS and there is none, segments are too long, a stream has no segment that counts, or
            tokens outside the model's vocabulary.
    """
    length, each = segmentation.length, "each" in segmentation.bos
    if bos is None and set(segmentation.bos) != {"none"}:
        raise UserError("this tokenizer has no BOS (and no EOS in its place): measure with --bos none")
    limit = longest_input(model)
    if streams and limit is not None and length + each > limit:
        more = " and the BOS before each" if each else ""
        raise UserError(f"segments of {length} tokens{more} are too long: the model takes {limit}")
    for name, tokens in streams.items():
        check_vocabulary(int(tokens.max()), model, name)
        if segmentation.whole and len(tokens) < length:
            raise UserError(f"{name} has {len(tokens)} tokens, which make no whole segment of {length}")


def measure_perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    segmentation: Segmentation,
    mode: BosMode,
    *,
    bos: int | None,
    batch_size: int,
    forward: Callable[[Tensor], Tensor] | None = None,
    progress: str | None = None,
) -> Perplexity:
    """Measure the perplexity of a stream.

    Args:
        model: any causal LM.
        tokens: token stream, int64 [tokens], at least 2 tokens; see ``check_streams``.
        segmentation: segments.
        mode: mode of placing a BOS: ``none``, ``once`` or ``each``.
        bos: id of the BOS token; None = there is none.
        batch_size: number of segments per forward pass.
        forward: function from tokens to logits; None = the model's own forward pass.
        progress: title under which progress is shown; None = it is not shown.
    """
    if mode == "once":
        tokens = torch.cat([torch.tensor([bos]), tokens])
    run = forward or (lambda inputs: model(input_ids=inputs, use_cache=False).logits)
    losses = torch.zeros((), dtype=torch.float64)
    count = 0
    total = sum(1 for _ in segments(tokens, segmentation))
    with Progress(desc=progress or "", total=total, unit="segments", disable=progress is None) as bar:
        for inputs, labels in batches(tokens, segmentation, bos if mode == "each" else None, batch_size):
            with torch.no_grad():
                logits = run(inputs.to(model.device))
                loss, number = token_losses(logits, labels.to(logits.device))
            losses += loss.double().sum().cpu()
            count += int(number.sum())
            bar.update(len(inputs))
    return Perplexity((losses / count).item(), count)


def batches(
    tokens: Tensor, segmentation: Segmentation, bos: int | None, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of segments of equal length, with labels that score every token at most once.

    Args:
        tokens: token stream, int64 [tokens].
        segmentation: segments.
        bos: id of a BOS token to place before each segment; None = no BOS.
        batch_size: number of segments per batch.

    Yields:
        Inputs and labels, int64 [≤ batch size, length].
    """
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    for segment, unscored in segments(tokens, segmentation):
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


def segments(tokens: Tensor, segmentation: Segmentation) -> Iterator[tuple[Tensor, int]]:
    """Segments of a stream, each with the number of its tokens that are scored before; the last may be shorter."""
    length, reached = segmentation.length, 0
    for start in range(0, len(tokens), segmentation.stride):
        segment = tokens[start : start + length]
        if segmentation.whole and len(segment) < length:
            return
        yield segment, reached - start
        reached = start + len(segment)
        if reached == len(tokens):
            return
