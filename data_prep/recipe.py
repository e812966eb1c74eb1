"""The recipe of a job: settings and tokenizer, which all parts of the job have in common."""

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
    """Settings for packing documents into samples.

    Attributes:
        sequence_length: number of tokens per sample.
        eval_fraction: share of the documents (by a hash of their text) that is kept for evaluation. A domain of four
            samples or more keeps enough for at least one sample, unless this is 0 or it has too few documents.
        bos: whether to place the beginning-of-sequence token before every document.
        eos: whether to place the end-of-sequence token after every document.
        max_bad: largest share of unusable records that is accepted.
        seed: seed of the split and of the sets.
        compression: compression of the shards, in the notation of MDS (``zstd:3``); None = no compression.
        sets: share of each set, by name; sets divide the training documents, each into a prepared folder in the output.
        conversations: settings of conversations, if records are prompts and responses, of which only the responses are
            learned; None = records are text.
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
        """Refuse impossible values.

        Raises:
            UserError: a value is impossible.
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
    """Values that all parts of a job and the manifest have in common; see ``PackSettings`` and ``DataManifest``."""

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
        """Make the recipe of a job.

        Args:
            settings: settings of packing.
            tokenizer: tokenizer of the model.
            settle: whether small domains may be divided in another way than by the hash; not allowed for parts of a
                job.
        """
        vocabulary = max(tokenizer.get_vocab().values()) + 1  # larger than len(tokenizer) if ids have gaps
        padding = None
        if settings.conversations is not None:
            padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            padding = 0 if padding is None else padding  # any token works: it is neither learned nor attended to
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
        """A packer for each set, by name; without sets, one packer with the name ""."""
        return {
            name: Packer(job.data / name, self.layout, job.packers_notes(name)) for name in (self.sets or {"": 1.0})
        }

    def manifest(self, packer: Packer, tokenizer_files: list[str]) -> DataManifest:
        """Finish a packer, and make the manifest of its data."""
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
    """Open a fast tokenizer from a folder or the hub.

    Raises:
        UserError: there is no tokenizer, or it is not fast.
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
    """Make the tokenising settings, and the function that turns records of conversations into documents."""
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
