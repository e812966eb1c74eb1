"""The contents of prepared data: counts, and samples as text."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from llmprune.data.format import EVAL, TRAIN, DataManifest
from llmprune.data.order import keyed_generator
from llmprune.data.prepared import PreparedData
from llmprune.data.reader import NO_LOSS, SplitReader
from llmprune.utils.errors import UserError
from llmprune.utils.untrusted import open_tokenizer


@dataclass(frozen=True)
class Shown:
    """A sample as text.

    Attributes:
        domain: name of the sample's domain.
        split: split of the sample, ``train`` or ``eval``.
        number: position of the sample in the split, over all shards.
        text: decoded tokens of the sample, including special tokens.
    """

    domain: str
    split: str
    number: int
    text: str


def table(manifest: DataManifest) -> list[str]:
    """Documents, tokens and samples of every domain and split, as lines of text."""
    lines = [
        f"{'domain':20} {'split':6} {'documents':>12} {'tokens':>15} {'samples':>12} {'share':>7} {'tokens/doc':>11} "
        f"{'left out':>9} {'empty':>8}"
    ]
    whole = {
        split: max(sum(manifest.samples(domain, split) for domain in manifest.domains), 1) for split in (TRAIN, EVAL)
    }
    for name, splits in manifest.domains.items():
        for split, counts in splits.items():
            lines.append(
                f"{name:20} {split:6} {counts.documents:12,} {counts.tokens:15,} {counts.samples:12,} "
                f"{counts.samples / whole[split]:7.1%} {counts.tokens / max(counts.documents, 1):11,.0f} "
                f"{counts.duplicates:9,} {counts.empty:8,}"
            )
    return lines


def lacking(manifest: DataManifest) -> list[str]:
    """Messages for the user about empty documents and domains without samples, as lines of text."""
    lines = []
    empty = sum(counts.empty for splits in manifest.domains.values() for counts in splits.values())
    if empty:
        lines.append(f"{empty:,} empty documents are left out")
    for name, splits in manifest.domains.items():
        if TRAIN in splits and not splits[TRAIN].samples:
            train = splits[TRAIN]
            reason = "all its texts are kept for evaluation"
            if train.documents:
                reason = f"its {train.documents} documents do not fill one"
            elif train.empty and not train.duplicates and EVAL not in splits:
                reason = f"its {train.empty} documents are empty"
            lines.append(f"{name:20} has no training sample: {reason}")
        elif not manifest.samples(name, EVAL):
            lines.append(f"{name:20} has no evaluation sample")
    return lines


def show_samples(data: PreparedData, samples: int, *, domain: str | None = None, seed: int = 17) -> Iterator[Shown]:
    """Draw random samples of every domain and split.

    Args:
        data: prepared data.
        samples: number of samples per domain and split.
        domain: name of the only domain to draw from; None = all.
        seed: seed of the choice.

    Raises:
        UserError: there is no such domain, or the data are damaged.
    """
    manifest = data.manifest
    if domain is not None and domain not in manifest.domains:
        raise UserError(f"there is no domain '{domain}'; there are {', '.join(sorted(manifest.domains))}")
    return _drawn(data, samples, domain, seed)


def _drawn(data: PreparedData, samples: int, domain: str | None, seed: int) -> Iterator[Shown]:
    tokenizer = open_tokenizer(data.tokenizer)
    for place, name in enumerate(sorted(data.manifest.domains)):
        for split in (TRAIN, EVAL):
            if domain not in (None, name) or not data.manifest.samples(name, split):
                continue
            reader = data.reader(name, split)
            total = sum(reader.shard_sizes)
            for number in sorted(keyed_generator(seed, place).permutation(total)[:samples].tolist()):
                yield Shown(name, split, number, _text(reader, number, tokenizer))


def _text(reader: SplitReader, number: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A sample as text; the parts of a conversation that are not learned are in ⟦ ⟧."""
    shard = 0
    while number >= reader.shard_sizes[shard]:
        number -= reader.shard_sizes[shard]
        shard += 1
    sample = reader.read(shard, number)
    tokens = sample["input_ids"].tolist()
    if "labels" not in sample:
        return str(tokenizer.decode(tokens))
    runs = groupby(zip(tokens, sample["labels"].tolist(), strict=True), key=lambda pair: pair[1] != NO_LOSS)
    texts = ((learned, tokenizer.decode([token for token, _ in run])) for learned, run in runs)
    return "".join(text if learned else f"⟦{text}⟧" for learned, text in texts)
