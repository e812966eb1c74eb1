"""Training a byte-level BPE tokenizer."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_prep.sources import Document, Fields, documents, find_files
from llmprune.errors import UserError
from llmprune.files import output_folder

BOS, EOS = "<s>", "</s>"


def train_tokenizer(
    inputs: Sequence[Path], out: Path | str, *, vocab_size: int, megabytes: float = 100.0, overwrite: bool = False
) -> PreTrainedTokenizerFast:
    """Train a tokenizer that encodes any text without loss and adds no special tokens of its own.

    Args:
        inputs: files and folders of text or JSON lines (field ``text``).
        out: folder to write.
        vocab_size: tokens in all, ``<s>``, ``</s>`` and the 256 bytes included.
        megabytes: how much text to read, at most, evenly from all files.
        overwrite: whether ``out`` may be replaced.

    Raises:
        UserError: the vocabulary is too small, or there is no text.
    """
    if vocab_size < 258:
        raise UserError(
            f"a vocabulary of {vocab_size} can't hold the 256 bytes and two special tokens: choose 258 or more"
        )
    files = find_files(inputs)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(files, int(megabytes * 1e6 / len(files))), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)
    with output_folder(out, overwrite) as folder:
        fast.save_pretrained(folder)
    return fast


def _texts(files: Sequence[tuple[Path, str]], characters_per_file: int) -> Iterator[str]:
    for file in files:
        left = characters_per_file
        for item in documents([file], Fields()):
            if left <= 0:
                break
            if isinstance(item, Document):
                yield item.text[:left]
                left -= len(item.text)
