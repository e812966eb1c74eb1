"""Training a byte-level BPE tokenizer."""

import logging
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmprune.data.records import Input, find_inputs
from llmprune.data.sources import BadRecord, Document, Fields, documents
from llmprune.utils.errors import UserError
from llmprune.utils.outputs import output_folder, refuse_existing, refuse_replacing

log = logging.getLogger(__name__)

BOS, EOS = "<s>", "</s>"


def train_tokenizer(
    inputs: Sequence[Path | str],
    out: Path | str,
    *,
    vocab_size: int,
    megabytes: float = 100.0,
    text_field: str = "text",
    overwrite: bool = False,
    bad: list[BadRecord] | None = None,
) -> PreTrainedTokenizerFast:
    """Train a tokenizer that encodes any text without loss and does not add special tokens.

    Args:
        inputs: files, folders and datasets; see ``find_inputs``.
        out: folder to write.
        vocab_size: total number of tokens, including ``<s>``, ``</s>`` and the 256 bytes.
        megabytes: largest amount of text to read, divided equally among all files.
        text_field: name of the field of JSON records with the text; nested names have dots.
        overwrite: whether ``out`` may be replaced.
        bad: list that unreadable, skipped records are added to; None = they are not returned.

    Raises:
        UserError: the vocabulary is too small, there is no text, or ``out`` would replace inputs.
    """
    bad = [] if bad is None else bad
    files = find_inputs(inputs)
    local = [path for path in map(Path, inputs) if path.exists()]
    refuse_replacing(out, [*local, *(source.path for source in files if source.path is not None)])
    refuse_existing(Path(out), overwrite)
    if vocab_size < 258:
        raise UserError(
            f"a vocabulary of {vocab_size} can't hold the 256 bytes and two special tokens: choose 258 or more"
        )
    characters = int(megabytes * 1e6 / len(files))
    if characters < 1:
        raise UserError(
            f"{megabytes} megabytes leave nothing to read of {len(files)} files: choose a larger --megabytes"
        )
    log.info(
        "training a tokenizer of %d tokens on %.1f MB of each of %d files at most",
        vocab_size,
        characters / 1e6,
        len(files),
    )
    with output_folder(out, overwrite) as folder:
        return _train(_texts(files, characters, Fields(text_field), bad), folder, vocab_size, bad)


def _train(texts: Iterator[str], folder: Path, vocab_size: int, bad: list[BadRecord]) -> PreTrainedTokenizerFast:
    first = next(texts, None)
    if first is None:
        reason = f" ({len(bad)} records can't be read; {bad[0].place}: {bad[0].reason})" if bad else ""
        raise UserError(f"the inputs hold no text{reason}: give files with text, or name its field with --text-field")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chain([first], texts), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        model_input_names=["input_ids", "attention_mask"],  # decoder models have no token types
    )
    fast.save_pretrained(folder)
    return fast


def _texts(files: Sequence[Input], characters_per_file: int, fields: Fields, bad: list[BadRecord]) -> Iterator[str]:
    """Yield the beginning of every file's documents; unreadable records are added to ``bad``."""
    for file in files:
        left = characters_per_file
        for item in documents([file], fields, text_bytes=4 * left):  # a character has at most four bytes
            if left <= 0:
                break
            if isinstance(item, Document):
                yield item.text[:left]
                left -= len(item.text)
            else:
                bad.append(item)
