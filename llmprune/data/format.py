"""The layout of prepared data, shared by the writer (data_prep) and the readers.

DATA/
  manifest.json                contents of the folder, and fingerprint of the tokenizer
  tokenizer/                   tokenizer that made the token ids
  DOMAIN/train/index.json …    MDS shards; one sample = ``sequence_length`` token ids, the places where documents
                               begin or continue (always 0) and, for conversations, which tokens are learned
  DOMAIN/eval/index.json …
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from llmprune.utils.errors import UserError
from llmprune.utils.files import inside, read_json, sha256_text, write_json

TOKENS, STARTS, LEARNED = "tokens", "starts", "learned"  # columns
TEACHER_TOKENS, TEACHER_LOGS = "teacher_tokens", "teacher_logs"  # further columns of training splits
COLUMNS = {TOKENS, STARTS, LEARNED, TEACHER_TOKENS, TEACHER_LOGS}
TRAIN, EVAL = "train", "eval"


def token_dtype(vocab_size: int) -> str:
    """The smaller of ``uint16`` and ``uint32`` that can store every id below ``vocab_size``."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase | Tokenizer) -> str:
    """SHA-256 over the vocabulary (every token and its id, with added tokens)."""
    return sha256_text(json.dumps(sorted(tokenizer.get_vocab().items())))


def columns(length: int, dtype: str, *, conversations: bool) -> dict[str, str]:
    """The MDS encodings of a sample's columns."""
    found = {TOKENS: f"ndarray:{dtype}:{length}", STARTS: "ndarray:uint32"}
    return {**found, LEARNED: f"ndarray:uint8:{length}"} if conversations else found


@dataclass
class SplitCounts:
    """The counts of one split of one domain.

    Attributes:
        documents: number of documents in the split; the end of the last ones may be missing.
        tokens: number of tokens in the samples, with padding.
        samples: number of samples of the data's sequence length.
        duplicates: number of documents left out because their text is already used for evaluation.
        empty: number of documents left out because they have no text.
    """

    documents: int = 0
    tokens: int = 0
    samples: int = 0
    duplicates: int = 0
    empty: int = 0


@dataclass
class DataManifest:
    """The contents of ``manifest.json`` of a prepared data folder.

    Attributes:
        sequence_length: number of tokens in each sample.
        dtype: MDS encoding of the token ids, ``uint16`` or ``uint32``.
        tokenizer: fingerprint of the tokenizer.
        vocab_size: number above all token ids.
        bos: whether every document begins with a BOS.
        eos: whether every document ends with an EOS.
        seed: seed of the split into training and evaluation.
        domains: counts of each split of each domain, by name.
        conversations: whether samples are of prompts and responses, of which only the responses are learned.
        compression: compression of the shards in MDS notation (``zstd:3``); None = none.
        tokenizer_files: names of the files in the folder ``tokenizer``.
        contents: SHA-256 over the checksums of all shards.
        teacher: description of the teacher whose predictions are stored with the tokens: model, vocab_size, top_k,
            temperature, boundaries, dtype, and the fingerprint of the data without predictions; None = no predictions.
    """

    sequence_length: int
    dtype: str
    tokenizer: str
    vocab_size: int
    bos: bool
    eos: bool
    seed: int
    domains: dict[str, dict[str, SplitCounts]]
    conversations: bool
    compression: str | None
    tokenizer_files: list[str]
    contents: str
    teacher: dict[str, Any] | None = None
    schema: int = 2

    def samples(self, domain: str, split: str) -> int:
        """The number of samples in a split of a domain; 0 if there is no such split."""
        return self.domains[domain][split].samples if split in self.domains[domain] else 0

    def fingerprint(self) -> str:
        """SHA-256 over the whole manifest."""
        return sha256_text(json.dumps(asdict(self), sort_keys=True))

    def save(self, folder: Path | str) -> None:
        """Write ``manifest.json`` into ``folder``."""
        write_json(Path(folder) / "manifest.json", asdict(self))

    @classmethod
    def load(cls, folder: Path | str) -> "DataManifest":
        """Read ``manifest.json`` of ``folder``.

        Raises:
            UserError: the folder has no prepared data, or those of another version.
        """
        folder = Path(folder)
        if (folder / "job.json").is_file():
            raise UserError(f"{folder} is a part of prepared data: join all parts with `python -m data_prep merge`")
        if not (folder / "manifest.json").is_file():
            if sets := sorted(path.parent.name for path in folder.glob("*/manifest.json")):
                raise UserError(f"{folder} holds several prepared sets: name one of them, such as {folder}/{sets[0]}")
            raise UserError(
                f"{folder} holds no prepared data (no manifest.json): make it with `python -m data_prep tokenize`"
            )
        values = read_json(folder / "manifest.json")
        try:
            if values["schema"] != cls.schema:
                raise UserError(
                    f"{folder}/manifest.json has schema {values['schema']}, this version reads "
                    f"{cls.schema}: prepare the data again"
                )
            domains = {
                domain: {split: SplitCounts(**counts) for split, counts in splits.items()}
                for domain, splits in values.pop("domains").items()
            }
            for name in (*domains, *values["tokenizer_files"]):
                inside(folder, name)
            return cls(domains=domains, **values)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder}/manifest.json is not a data manifest ({error}): prepare the data again"
            ) from None
