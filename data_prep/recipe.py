"""What a job makes of its documents: settings, the tokenizer, and what all parts of a job have in common."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from streaming.base.compression import is_compression
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from data_prep.conversations import ConversationSettings, renderer
from data_prep.encode import Tokens
from data_prep.job import PackingJob
from data_prep.packer import Layout, Packer
from llmprune.data.format import DataManifest, token_dtype, tokenizer_fingerprint
from llmprune.data.sources import Render, clean_name, folded
from llmprune.utils.errors import UserError, first_line
from llmprune.utils.files import sha256_text
from llmprune.utils.untrusted import open_tokenizer


@dataclass(frozen=True)
class PackSettings:
    """How documents become samples.

    Attributes:
        sequence_length: tokens per sample.
        eval_fraction: share of the documents (by a hash of their text) that is kept for evaluation. A domain of four
            samples or more keeps at least one sample's worth, unless this is 0 or its documents are too few.
        bos: put the beginning-of-sequence token before every document.
        eos: put the end-of-sequence token after every document.
        max_bad: share of unusable records that is put up with.
        seed: of the split and of the sets.
        compression: of the shards, as MDS names it (``zstd:3``); None = none.
        sets: name and share of sets that divide the documents for training, each a prepared folder below the output.
        conversations: records are prompts and responses, of which the responses alone are learned; None = text.
    """

    sequence_length: int
    eval_fraction: float = 0.01
    bos: bool = False
    eos: bool = True
    max_bad: float = 0.01
    seed: int = 17
    compression: str | None = None
    sets: Mapping[str, float] = field(default_factory=dict)
    conversations: ConversationSettings | None = None

    def check(self) -> None:
        """Refuse what can't work.

        Raises:
            UserError: what is wrong.
        """
        if self.sequence_length < 2:
            raise UserError(f"a sequence length of {self.sequence_length} leaves nothing to predict: choose 2 or more")
        if not 0 <= self.seed < 1 << 63:
            raise UserError(f"the seed {self.seed} must be zero or positive, and below 2^63")
        if not 0 <= self.max_bad <= 1:
            raise UserError(f"the share of bad records {self.max_bad} must lie in [0, 1]")
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"the evaluation fraction {self.eval_fraction} must lie in [0, 1)")
        if self.compression is not None and not is_compression(self.compression):
            raise UserError(f"there is no compression '{self.compression}': write zstd, or zstd:LEVEL")
        for name, share in self.sets.items():
            if clean_name(name) != name or not 0 < share <= 1:
                raise UserError(f"the set '{name}={share}' needs a name good for a folder and a share in (0, 1]")
        if len({folded(name) for name in self.sets}) < len(self.sets):
            raise UserError(
                f"the sets {', '.join(self.sets)} must not differ in upper and lower case alone: some file systems "
                "don't tell such names apart"
            )
        if sum(self.sets.values()) > 1 + 1e-9:
            raise UserError(f"the sets take {sum(self.sets.values()):g} of the documents: at most 1 can be given out")


@dataclass(frozen=True)
class Recipe:
    """What all parts of a job have in common, and what a manifest says; see ``PackSettings`` and ``DataManifest``."""

    layout: Layout
    tokenizer: str
    tokenising: str
    vocab_size: int
    bos: bool
    eos: bool
    seed: int
    sets: dict[str, float]
    conversations: dict[str, str] | None

    @classmethod
    def of(cls, settings: PackSettings, tokenizer: PreTrainedTokenizerFast, *, settle: bool) -> "Recipe":
        """The recipe of a job.

        Args:
            settings: what is wanted.
            tokenizer: the model's.
            settle: whether small domains may be split another way than the hash says; parts of a job may not.
        """
        vocabulary = max(tokenizer.get_vocab().values()) + 1  # more than len(tokenizer) where ids have gaps
        padding = None
        if settings.conversations is not None:
            padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            padding = 0 if padding is None else padding  # any will do, it is neither learned nor attended to
        return cls(
            layout=Layout(
                settings.sequence_length,
                token_dtype(vocabulary),
                settings.eval_fraction,
                settle=settle and not settings.sets,
                compression=settings.compression,
                padding=padding,
            ),
            tokenizer=tokenizer_fingerprint(tokenizer),
            tokenising=sha256_text(tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)),
            vocab_size=vocabulary,
            bos=settings.bos,
            eos=settings.eos,
            seed=settings.seed,
            sets=dict(settings.sets),
            conversations=None if settings.conversations is None else settings.conversations.described(),
        )

    def packers(self, job: PackingJob) -> dict[str, Packer]:
        """A packer for each set, or the only one."""
        return {
            name: Packer(job.data / name, self.layout, job.packers_notes(name)) for name in (self.sets or {"": 1.0})
        }

    def manifest(self, packer: Packer, tokenizer_files: list[str]) -> DataManifest:
        """The manifest of what a packer wrote, which is finished by this."""
        domains = packer.finish()
        return DataManifest(
            sequence_length=self.layout.length,
            dtype=self.layout.dtype,
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            bos=self.bos,
            eos=self.eos,
            seed=self.seed,
            domains=domains,
            conversations=self.conversations is not None,
            compression=self.layout.compression,
            tokenizer_files=tokenizer_files,
            contents=sha256_text(" ".join(packer.checksums())),
        )


def load_fast_tokenizer(tokenizer: Path | str) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a folder or the hub.

    Raises:
        UserError: there is none, or it is not fast.
    """
    try:
        loaded = open_tokenizer(tokenizer)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{tokenizer} has no usable tokenizer: give the folder of one, or a model's name on the hub "
            f"({first_line(error)})"
        ) from None
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer of {tokenizer} is not a fast one: convert it with transformers first")
    return loaded


def tokens_of(tokenizer: PreTrainedTokenizerFast, settings: PackSettings, name: str) -> tuple[Tokens, Render | None]:
    """How documents become tokens, and how records of conversations become documents."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    render = None if settings.conversations is None else renderer(settings.conversations, tokenizer)
    if settings.conversations is not None and settings.conversations.template == "chat":
        return Tokens(backend, [], []), render  # the template has all special tokens
    backend.encode_special_tokens = True  # the text "</s>" in a document is text
    for wanted, token, option in ((settings.bos, "bos", "--no-bos"), (settings.eos, "eos", "--no-eos")):
        if wanted and getattr(tokenizer, f"{token}_token_id") is None:
            raise UserError(f"the tokenizer of {name} has no {token.upper()} token: pass {option}")
    prefix = [tokenizer.bos_token_id] if settings.bos else []
    suffix = [tokenizer.eos_token_id] if settings.eos else []
    return Tokens(backend, prefix, suffix), render
