"""The layout of prepared data, shared by the writer (data_prep) and the readers.

DATA/
  manifest.json                what is here and which tokenizer made it
  tokenizer/                   that tokenizer
  DOMAIN/train/index.json …    MDS shards; one sample = ``sequence_length`` token ids
  DOMAIN/eval/index.json …
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llmprune.errors import UserError
from llmprune.files import read_json, sha256_text, write_json

COLUMN = "tokens"
TRAIN, EVAL = "train", "eval"


def token_dtype(vocab_size: int) -> str:
    """The narrowest of ``uint16`` and ``uint32`` that holds every id below ``vocab_size``."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over the vocabulary (every token and its id, added tokens included)."""
    return sha256_text(json.dumps(sorted(tokenizer.get_vocab().items())))


@dataclass
class SplitCounts:
    """What one split of one domain holds."""

    documents: int
    tokens: int
    samples: int


@dataclass
class DataManifest:
    """``manifest.json`` of a prepared data folder.

    ``domains`` maps each domain to its splits (``train``, ``eval``) and their counts; ``dtype`` is the MDS encoding of
    the ids (``uint16`` or ``uint32``).
    """

    sequence_length: int
    dtype: str
    tokenizer: str
    vocab_size: int
    bos: bool
    eos: bool
    seed: int
    domains: dict[str, dict[str, SplitCounts]]
    schema: int = 1

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
        if not (folder / "manifest.json").is_file():
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
            return cls(domains=domains, **values)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder}/manifest.json is not a data manifest ({error}): prepare the data again"
            ) from None
