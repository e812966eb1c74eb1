"""From documents to MDS shards of fixed-length samples."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.encode import Batch, encoded
from data_prep.samples import Packer
from data_prep.split import rank_of
from llmprune.data.format import DataManifest, token_dtype, tokenizer_fingerprint
from llmprune.data.sources import BadRecord, Document, Fields, documents, find_files
from llmprune.errors import UserError
from llmprune.files import output_folder, refuse_existing, refuse_replacing

_BATCH_CHARACTERS = 250_000  # small, so that no process idles for long while the last batches finish
_EARLY_STOP = 100  # bad records, before the share of bad ones is looked at while reading


@dataclass(frozen=True)
class PackSettings:
    """How documents become samples.

    Attributes:
        sequence_length: tokens per sample.
        eval_fraction: share of the documents (by a hash of their text) that is kept for evaluation. A domain of four
            samples or more keeps at least one sample's worth, unless this is 0 or its documents are too few.
        bos: put the beginning-of-sequence token before every document.
        eos: put the end-of-sequence token after every document.
        max_bad: share of unreadable records that is put up with.
        seed: of the split.
    """

    sequence_length: int
    eval_fraction: float = 0.01
    bos: bool = False
    eos: bool = True
    max_bad: float = 0.01
    seed: int = 17


@dataclass
class Summary:
    """What ``prepare`` did: the manifest and the records that it skipped."""

    manifest: DataManifest
    bad: list[BadRecord] = field(default_factory=list)


def prepare(
    inputs: Sequence[Path],
    tokenizer: Path | str,
    out: Path | str,
    settings: PackSettings,
    *,
    fields: Fields | None = None,
    processes: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Summary:
    """Tokenise, pack and write documents, one folder per domain.

    Documents are tokenised in parallel, and packed and written in their order, so the result does not depend on the
    number of processes. Texts that are equal go to the same split. An incomplete last sample is dropped.

    Args:
        inputs: files and folders.
        tokenizer: folder or hub name of a fast tokenizer.
        out: folder to write (see ``llmprune.data.format``).
        settings: how.
        fields: of JSON records.
        processes: tokenising processes; None = one per core, 1 = this one.
        overwrite: whether ``out`` may be replaced.
        progress: show a bar on standard error.

    Raises:
        UserError: inputs, tokenizer or settings that can't work; an output that would replace inputs; too many bad
            records; a domain too short for one sample.
    """
    files = find_files(inputs)
    local = [Path(tokenizer)] if Path(tokenizer).exists() else []  # else it is a name on the hub
    refuse_replacing(out, [*inputs, *(path for path, _ in files), *local])
    refuse_existing(Path(out), overwrite)
    if settings.sequence_length < 2:
        raise UserError(f"a sequence length of {settings.sequence_length} leaves nothing to predict: choose 2 or more")
    if processes is not None and processes < 1:
        raise UserError(f"{processes} processes can't do anything: choose 1 or more")
    if not 0 <= settings.max_bad <= 1:
        raise UserError(f"the share of bad records {settings.max_bad} must lie in [0, 1]")
    if not 0 <= settings.eval_fraction < 1:
        raise UserError(f"the evaluation fraction {settings.eval_fraction} must lie in [0, 1)")
    loaded = load_fast_tokenizer(tokenizer)
    prefix, suffix = _special_ids(loaded, settings, str(tokenizer))
    backend = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # the text "</s>" in a document is text
    vocabulary = max(loaded.get_vocab().values()) + 1  # more than len(loaded) where ids have gaps
    dtype = token_dtype(vocabulary)
    bad: list[BadRecord] = []
    with (
        output_folder(out, overwrite) as folder,
        tqdm(total=sum(p.stat().st_size for p, _ in files), unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        packer = Packer(
            folder,
            sequence_length=settings.sequence_length,
            eval_fraction=settings.eval_fraction,
            dtype=dtype,
            prefix=prefix,
            suffix=suffix,
        )
        batches = _batches(documents(files, fields or Fields()), settings, bad)
        with closing(encoded(backend, batches, processes or _cores())) as results:
            for batch, ids in results:
                packer.add(batch, ids)
                bar.update(batch.position - bar.n)
        _check_bad(bad, packer.documents, settings.max_bad)
        loaded.save_pretrained(folder / "tokenizer")
        manifest = DataManifest(
            sequence_length=settings.sequence_length,
            dtype=dtype,
            tokenizer=tokenizer_fingerprint(loaded),
            vocab_size=vocabulary,
            bos=settings.bos,
            eos=settings.eos,
            seed=settings.seed,
            domains=packer.finish(),
        )
        manifest.save(folder)
    return Summary(manifest, bad)


def load_fast_tokenizer(tokenizer: Path | str) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a folder or the hub.

    Raises:
        UserError: there is none, or it is not fast.
    """
    try:
        loaded = AutoTokenizer.from_pretrained(str(tokenizer))
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{tokenizer} has no usable tokenizer: give the folder of one, or a model's name on the hub ({reason})"
        ) from None
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer of {tokenizer} is not a fast one: convert it with transformers first")
    return loaded


def _cores() -> int:
    """Cores that this process may use; fewer than the machine's under a container's limits."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _batches(found: Iterable[Document | BadRecord], settings: PackSettings, bad: list[BadRecord]) -> Iterator[Batch]:
    """Gather documents into batches and bad records in ``bad``."""
    batch = Batch([], [], [], 0)
    characters = total = 0
    for item in found:
        if isinstance(item, BadRecord):
            bad.append(item)
            if len(bad) > _EARLY_STOP:
                _check_bad(bad, total, settings.max_bad)
            continue
        total += 1
        batch.texts.append(item.text)
        batch.domains.append(item.domain)
        batch.ranks.append(rank_of(item.text, settings.seed))
        batch.position = item.position
        characters += len(item.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = Batch([], [], [], 0), 0
    if batch.texts:
        yield batch


def _check_bad(bad: list[BadRecord], good: int, limit: float) -> None:
    if len(bad) > limit * (len(bad) + good):
        shown = "; ".join(f"{record.place}: {record.reason}" for record in bad[:3])
        raise UserError(
            f"{len(bad)} of {len(bad) + good} records can't be read, more than the {limit:.1%} allowed "
            f"by --max-bad: {shown}"
        )


def _special_ids(tokenizer: PreTrainedTokenizerFast, settings: PackSettings, name: str) -> tuple[list[int], list[int]]:
    """Ids put before and after every document."""
    for wanted, token, option in ((settings.bos, "bos", "--no-bos"), (settings.eos, "eos", "--no-eos")):
        if wanted and getattr(tokenizer, f"{token}_token_id") is None:
            raise UserError(f"the tokenizer of {name} has no {token.upper()} token: pass {option}")
    return (
        [tokenizer.bos_token_id] if settings.bos else [],
        [tokenizer.eos_token_id] if settings.eos else [],
    )
