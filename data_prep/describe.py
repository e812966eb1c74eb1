"""What prepared data hold: counts, and samples as text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from llmprune.data.dataset import DomainReader
from llmprune.data.format import DataManifest
from llmprune.data.order import keyed_generator
from llmprune.errors import UserError


@dataclass(frozen=True)
class Shown:
    """A sample as text.

    Attributes:
        domain: its domain.
        split: ``train`` or ``eval``.
        number: its place in the split, over all shards.
        text: its tokens, decoded; special tokens are shown.
    """

    domain: str
    split: str
    number: int
    text: str


def table(manifest: DataManifest) -> list[str]:
    """Documents, tokens and samples of every domain and split, as lines of text."""
    lines = [f"{'domain':20} {'split':6} {'documents':>12} {'tokens':>15} {'samples':>12} {'share':>7}"]
    for name, splits in manifest.domains.items():
        for split, counts in splits.items():
            whole = sum(inner[split].samples for inner in manifest.domains.values() if split in inner)
            lines.append(
                f"{name:20} {split:6} {counts.documents:12,} {counts.tokens:15,} {counts.samples:12,} "
                f"{counts.samples / max(whole, 1):7.1%}"
            )
    return lines


def show_samples(folder: Path | str, samples: int, *, domain: str | None = None, seed: int = 17) -> Iterator[Shown]:
    """Samples of every domain and split, drawn at random.

    Args:
        folder: prepared data.
        samples: how many of each.
        domain: of this domain alone.
        seed: of the choice.

    Raises:
        UserError: there is no such domain, or the data are damaged.
    """
    folder = Path(folder)
    manifest = DataManifest.load(folder)
    if domain is not None and domain not in manifest.domains:
        raise UserError(f"there is no domain '{domain}'; there are {', '.join(sorted(manifest.domains))}")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    for place, name in enumerate(sorted(manifest.domains)):
        for split, counts in manifest.domains[name].items():
            if not counts.samples or domain not in (None, name):
                continue
            reader = DomainReader(folder, name, split)
            chosen = keyed_generator(seed, place).permutation(counts.samples)[:samples]
            for number in sorted(chosen.tolist()):
                shard, index = 0, number
                while index >= reader.shard_sizes[shard]:
                    index -= reader.shard_sizes[shard]
                    shard += 1
                yield Shown(name, split, number, tokenizer.decode(reader.read(shard, index)))
