"""The layout of prepared data, shared by the writer (data_prep) and the readers.

DATA/
  manifest.json                what is here and which tokenizer made it
  tokenizer/                   that tokenizer
  DOMAIN/train/index.json …    MDS shards; one sample = ``sequence_length`` token ids, the places where documents
                               begin or go on (0 always) and, for conversations, which tokens are learned
  DOMAIN/eval/index.json …
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmprune.utils.errors import UserError
from llmprune.utils.files import inside, read_json, sha256_text, write_json

TOKENS, STARTS, LEARNED = "tokens", "starts", "learned"  # columns
TEACHER_TOKENS, TEACHER_LOGS = "teacher_tokens", "teacher_logs"  # further ones, of training splits
COLUMNS = {TOKENS, STARTS, LEARNED, TEACHER_TOKENS, TEACHER_LOGS}
TRAIN, EVAL = "train", "eval"


def token_dtype(vocab_size: int) -> str:
    """The narrowest of ``uint16`` and ``uint32`` that holds every id below ``vocab_size``."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the vocabulary (every token and its id, added tokens included)."""
    return sha256_text(json.dumps(sorted(tokenizer.get_vocab().items())))


def columns(length: int, dtype: str, *, conversations: bool) -> dict[str, str]:
    """The MDS encodings of a sample's columns."""
    found = {TOKENS: f"ndarray:{dtype}:{length}", STARTS: "ndarray:uint32"}
    return {**found, LEARNED: f"ndarray:uint8:{length}"} if conversations else found


@dataclass
class SplitCounts:
    """What one split of one domain holds.

    Attributes:
        documents: that went into it; the end of the last ones may be missing.
        tokens: in its samples, padding included.
        samples: of the data's sequence length.
        duplicates: documents left out because their text is kept for evaluation already.
        empty: documents left out because they have no text.
    """

    documents: int = 0
    tokens: int = 0
    samples: int = 0
    duplicates: int = 0
    empty: int = 0


@dataclass
class DataManifest:
    """``manifest.json`` of a prepared data folder.

    Attributes:
        sequence_length: tokens per sample.
        dtype: MDS encoding of the ids, ``uint16`` or ``uint32``.
        tokenizer: fingerprint of the tokenizer.
        vocab_size: ids lie below it.
        bos: whether every document begins with a BOS.
        eos: whether every document ends with an EOS.
        seed: of the split.
        domains: the splits of each domain and their counts.
        conversations: whether samples are of prompts and responses, of which the responses alone are learned.
        compression: of the shards, as in MDS (``zstd:3``); None = none.
        tokenizer_files: in the folder ``tokenizer``.
        contents: SHA-256 over the checksums of all shards.
        teacher: whose predictions lie beside the tokens, and which: model, vocab_size, top_k, temperature,
            boundaries, dtype, and the data without them (fingerprint); None = none.
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
        """How many samples a split of a domain has; 0 if there is no such split."""
        return self.domains[domain][split].samples if split in self.domains[domain] else 0

    def fingerprint(self) -> str:
        """SHA-256 over everything that the manifest says."""
        return sha256_text(json.dumps(asdict(self), sort_keys=True))

    def save(self, folder: Path | str) -> None:
        """Write ``manifest.json`` into ``folder``."""
        write_json(Path(folder) / "manifest.json", asdict(self))

    @classmethod
    def load(cls, folder: Path | str) -> "DataManifest":
        """Read ``manifest.json`` of ``folder``.

        Raises:
            UserError: the folder is no prepared data, or another version's.
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
