"""Calibration samples: a few sequences of tokens with which the parts of a model are scored."""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.data.dataset import MixedDataset
from llmprune.data.format import TRAIN, tokenizer_fingerprint
from llmprune.data.prepared import PreparedData
from llmprune.data.records import find_inputs
from llmprune.data.sources import Document, Fields, documents
from llmprune.utils.errors import UserError
from llmprune.utils.settings import check_settings

log = logging.getLogger(__name__)

LENGTH = 512  # tokens of a sample, unless the settings say otherwise
BYTES_PER_TOKEN = 32  # more than any text has, except for long runs of spaces


def calibration_samples(config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The calibration samples, int64 [samples, length].

    From prepared data, the samples are the first ones of the training stream, with all domains in proportion. Text
    files are read in order of their names, and documents are joined with an EOS between them.

    Raises:
        UserError: the data can't be read, are of another tokenizer, or are too short.
    """
    if config.path is None:
        raise UserError("the criteria need calibration text: name it with --data (layer_scoring.data.path in a YAML)")
    config = with_length(config, None)
    check_settings(config)
    bos = tokenizer.bos_token_id
    if config.bos != "none" and bos is None:
        raise UserError(f"this tokenizer has no BOS token: choose bos none instead of {config.bos}")
    path = Path(str(config.path))
    read = _prepared if (path / "manifest.json").is_file() else _from_text
    samples = torch.tensor(list(read(config, tokenizer)), dtype=torch.int64)
    log.info("%d calibration samples of %d tokens are read from %s", *samples.shape, config.path)
    if config.bos == "each":
        samples = torch.cat([torch.full((len(samples), 1), bos), samples], dim=1)
    elif config.bos == "first":
        samples[0] = torch.cat([torch.tensor([bos]), samples[0, :-1]])
    return samples


def with_length(config: CalibrationConfig, longest: int | None) -> CalibrationConfig:
    """The settings with the length of the samples, if they do not have it: 512 tokens, where they can be as long.

    Args:
        config: settings of the samples.
        longest: number of tokens that the model takes at most; None = any.
    """
    if config.length is not None:
        return config
    prepared = config.path is not None and (Path(config.path) / "manifest.json").is_file()
    own = PreparedData(str(config.path)).manifest.sequence_length if prepared else None
    return replace(config, length=min(filter(None, (LENGTH, longest, own))))


def check_calibration(config: CalibrationConfig, longest: int | None) -> None:
    """Check, before anything is read, that there is text, and that the model takes samples of this length.

    Args:
        config: settings of the samples.
        longest: number of tokens that the model takes at most; None = any.

    Raises:
        UserError: the text does not exist, or the samples are too long.
    """
    if longest is not None and config.length is not None and config.length > longest:
        raise UserError(f"samples of {config.length} tokens are too long: the model takes {longest}")
    if config.path is not None and not (Path(config.path) / "manifest.json").is_file():
        find_inputs([Path(config.path)])


def samples_fingerprint(samples: Tensor) -> str:
    """SHA-256 of the samples' tokens."""
    return hashlib.sha256(samples.contiguous().numpy().tobytes()).hexdigest()


def _prepared(config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    assert config.path is not None and config.length is not None
    data = PreparedData(config.path)
    manifest = data.manifest
    if tokenizer_fingerprint(tokenizer) != manifest.tokenizer:
        raise UserError(f"the model's tokenizer did not make the data in {config.path}: prepare the data with it")
    if config.length > manifest.sequence_length:
        raise UserError(
            f"the samples in {config.path} have {manifest.sequence_length} tokens; ask for no more than that, not "
            f"{config.length}"
        )
    available = sum(manifest.samples(domain, TRAIN) for domain in manifest.domains)
    _enough(config, available)
    stream = MixedDataset(data, global_batch_size=config.samples, weights=None, seed=config.seed)
    own = config.length - (config.bos == "each")
    for sample in islice(stream, config.samples):
        yield sample["input_ids"][:own].tolist()


def _from_text(config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    assert config.path is not None and config.length is not None
    own = config.length - (config.bos == "each")
    wanted = own * config.samples
    tokens = _tokens(config, tokenizer, wanted, BYTES_PER_TOKEN * wanted)
    if len(tokens) < wanted:  # unusual text with few tokens: read all of it
        tokens = _tokens(config, tokenizer, wanted, None)
    _enough(config, len(tokens) // own)
    for sample in range(config.samples):
        yield tokens[sample * own : (sample + 1) * own]


def _tokens(
    config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase, wanted: int, text_bytes: int | None
) -> list[int]:
    """At least ``wanted`` tokens, if the text has enough; of a long text only the beginning is read and tokenised."""
    assert config.path is not None and config.length is not None
    tokens: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    inputs = find_inputs([Path(config.path)])
    read = documents(inputs, Fields(config.text_field), text_bytes=text_bytes)
    for number, document in enumerate(read):
        if not isinstance(document, Document):
            raise UserError(f"{document.place} can't be read: {document.reason}")
        tokens += tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"] + end
        if len(tokens) >= wanted:
            if number == 0 and (len(inputs) > 1 or next(read, None) is not None):
                log.warning(
                    "all calibration samples are of the first document of %s: prepared data (python -m data_prep "
                    "tokenize) give samples of all",
                    config.path,
                )
            break
    return tokens


def _enough(config: CalibrationConfig, available: int) -> None:
    if available < config.samples:
        remedy = f"ask for {available} samples" if available else "give more text or shorter samples"
        raise UserError(
            f"{config.path} has text for {available} samples of {config.length} tokens, not for {config.samples}: "
            f"{remedy}"
        )
