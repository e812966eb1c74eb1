"""From documents to MDS shards of fixed-length samples."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from streaming.base.compression import is_compression
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_prep.conversations import ConversationSettings, renderer
from data_prep.encode import Batch, Tokens, encoded
from data_prep.job import Job, Progress, opened_job
from data_prep.join import Encoded
from data_prep.packer import Arrival, Layout, Packer
from data_prep.split import rank_of, set_of, split_of
from llmprune.data.format import EVAL, DataManifest, token_dtype, tokenizer_fingerprint
from llmprune.data.records import Input, find_inputs
from llmprune.data.sources import BadRecord, Document, Fields, Place, Render, clean_name, documents
from llmprune.errors import UserError, first_line
from llmprune.files import put_in_place, read_json, refuse_existing, refuse_replacing, sha256_text

_BATCH_CHARACTERS = 250_000  # small, so that no process idles for long while the last batches finish
_EARLY_STOP = 100  # bad records, before the share of bad ones is looked at while reading
_SAVE_SECONDS = 60.0  # between two times that a job is written down


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


@dataclass(frozen=True)
class _Recipe:
    """What all parts of a job have in common, and what a manifest says."""

    layout: Layout
    tokenizer: str
    vocab_size: int
    bos: bool
    eos: bool
    seed: int
    sets: dict[str, float]
    conversations: dict[str, str] | None

    @classmethod
    def of(cls, settings: PackSettings, tokenizer: PreTrainedTokenizerFast, *, settle: bool) -> "_Recipe":
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
            vocab_size=vocabulary,
            bos=settings.bos,
            eos=settings.eos,
            seed=settings.seed,
            sets=dict(settings.sets),
            conversations=None if settings.conversations is None else asdict(settings.conversations),
        )

    def packers(self, job: Job) -> dict[str, Packer]:
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


@dataclass
class Summary:
    """What was done: the manifest of each set (of the only one, under "") and the records that were skipped."""

    manifests: dict[str, DataManifest]
    bad: list[BadRecord] = field(default_factory=list)

    @property
    def manifest(self) -> DataManifest:
        """The only manifest."""
        (manifest,) = self.manifests.values()
        return manifest


def prepare(
    inputs: Sequence[Path | str],
    tokenizer: Path | str,
    out: Path | str,
    settings: PackSettings,
    *,
    fields: Fields | None = None,
    eval_inputs: Sequence[Path | str] = (),
    shard: tuple[int, int] | None = None,
    processes: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Summary:
    """Tokenise, pack and write documents, one folder per domain.

    Documents are tokenised in parallel, and packed and written in their order, so the result does not depend on the
    number of processes. Texts that are equal go to the same split. An incomplete last sample of text is dropped.

    A job that is stopped, however, leaves a hidden folder beside ``out``; the same call goes on from there.

    Args:
        inputs: files, folders, and datasets (``hf:NAME:CONFIG:SPLIT``).
        tokenizer: folder or hub name of a fast tokenizer.
        out: folder to write (see ``llmprune.data.format``).
        settings: how.
        fields: of records.
        eval_inputs: what is kept for evaluation, in place of a share of ``inputs``; their texts are left out there.
        shard: (i, n): do only the i-th of n parts, which ``merge`` makes into one.
        processes: tokenising processes; None = one per core, 1 = this one.
        overwrite: whether ``out`` may be replaced.
        progress: show a bar on standard error.

    Raises:
        UserError: inputs, tokenizer or settings that can't work; an output that would replace inputs; too many bad
            records; a domain too short for one sample.
    """
    settings = replace(settings, eval_fraction=0.0) if eval_inputs else settings
    held_out, found = (find_inputs(names) if names else [] for names in (eval_inputs, inputs))
    local = [Path(tokenizer)] if Path(tokenizer).exists() else []  # else it is a name on the hub
    read = [source.path for source in (*held_out, *found) if source.path is not None]
    refuse_replacing(out, [*(path for path in map(Path, (*inputs, *eval_inputs)) if path.exists()), *read, *local])
    refuse_existing(Path(out), overwrite)
    _check(settings, processes, shard)
    loaded = load_fast_tokenizer(tokenizer)
    tokens, render = _tokens(loaded, settings, str(tokenizer))
    reading = _Reading(_part(held_out, shard), _part(found, shard), settings, fields or Fields(), render)
    if shard and not reading.training:
        raise UserError(f"part {shard[0]} of {shard[1]} has no input: there are fewer files than parts")
    recipe = _Recipe.of(settings, loaded, settle=shard is None)
    description = {
        "recipe": asdict(recipe),
        "inputs": [asdict(source) for source in reading.inputs],
        "fields": asdict(reading.fields),
        "shard": None if shard is None else list(shard),
    }
    with opened_job(out, description, overwrite=overwrite) as job:
        packers = recipe.packers(job)
        done = job.resume(packers)
        reading.leave_out(held_out)
        total = sum(source.size for source in reading.inputs)
        with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
            _pack(reading, tokens, packers, job, done, processes or _cores(), bar)
        _check_bad(done.bad, done.documents, settings.max_bad)
        if shard is not None:
            job.save(packers, done)
            loaded.save_pretrained(job.folder / "tokenizer")
            put_in_place(job.folder, Path(out).resolve())
            return Summary({}, done.bad)
        return Summary(_finish(job, packers, recipe, loaded, out), done.bad)


def merge(parts: Sequence[Path | str], out: Path | str, *, overwrite: bool = False) -> Summary:
    """Make the parts of a job, all of them, into prepared data. Shards are linked where the file system allows it.

    Args:
        parts: what ``prepare`` wrote with ``shard``, in any order.
        out: folder to write.
        overwrite: whether ``out`` may be replaced.

    Raises:
        UserError: a part is missing, there twice, or of another job.
    """
    refuse_replacing(out, parts)
    jobs: dict[int, Job] = {}
    recipes, count = [], 0
    for path in map(Path, parts):
        if not (path / "job.json").is_file():
            raise UserError(f"{path} is no part of a job: make it with --shard")
        description = read_json(path / "job.json")
        number, count = description["shard"]
        if number in jobs:
            raise UserError(f"{path} and {jobs[number].folder} are the same part, {number} of {count}")
        jobs[number] = Job(path)
        recipes.append(description["recipe"])
    if any(recipe != recipes[0] for recipe in recipes):
        raise UserError("the parts were made with different settings or tokenizers")
    if missing := sorted(set(range(count)) - jobs.keys()):
        raise UserError(f"of {count} parts these are missing: {', '.join(map(str, missing))}")
    recipe = _Recipe(**{**recipes[0], "layout": Layout(**recipes[0]["layout"])})
    described = {"recipe": asdict(recipe), "parts": [str(jobs[number].folder.resolve()) for number in sorted(jobs)]}
    bad: list[BadRecord] = []
    with opened_job(out, described, overwrite=overwrite) as job:
        packers = recipe.packers(job)
        job.resume(packers)
        for number in sorted(jobs):
            part = jobs[number]
            progress, state = part.load()
            bad += progress.bad
            for name, packer in packers.items():
                packer.absorb(state / (name or "all"), part.data / name)
        tokenizer = AutoTokenizer.from_pretrained(jobs[0].folder / "tokenizer")
        return Summary(_finish(job, packers, recipe, tokenizer, out), bad)


class _Reading:
    """Reads the documents of a job and says where each of them belongs.

    Attributes:
        inputs: all, those for evaluation first.
        training: those that are not for evaluation.
        fields: of records.
        settings: of the job.
    """

    def __init__(
        self,
        held_out: list[Input],
        training: list[Input],
        settings: PackSettings,
        fields: Fields,
        render: Render | None,
    ) -> None:
        self.inputs, self.training, self.fields = [*held_out, *training], training, fields
        self.settings, self._render = settings, render
        self._left_out: set[int] = set()

    def leave_out(self, held_out: list[Input]) -> None:
        """Leave the texts of these inputs out of training."""
        for item in self._documents(held_out, (0, 0)):
            if isinstance(item, Document):
                self._left_out.add(rank_of(item.text, self.settings.seed))

    def _documents(self, inputs: list[Input], after: Place) -> Iterator[Document | BadRecord]:
        rendered = self.settings.conversations.fields if self.settings.conversations else ()
        return documents(inputs, self.fields, after=after, render=self._render, rendered=rendered)

    def batches(self, after: Place) -> Iterator[Batch]:
        """Documents and bad records behind a place."""
        batch, characters = Batch(place=after), 0
        for item in self._documents(self.inputs, after):
            if isinstance(item, BadRecord):
                batch.bad.append(item)
            else:
                batch.documents.append(item)
                batch.place, batch.position = item.place, item.position
                characters += len(item.text)
            if characters >= _BATCH_CHARACTERS or len(batch.bad) > _EARLY_STOP:
                yield batch
                batch, characters = Batch(place=batch.place, position=batch.position), 0
        yield batch

    def sort(self, document: Document, content: Encoded) -> Iterator[tuple[str, Arrival | None]]:
        """The sets that a document goes into; with None, those that it is left out of."""
        settings = self.settings
        rank = rank_of(document.text, settings.seed)
        evaluation = document.place[0] < len(self.inputs) - len(self.training)
        sets: Iterable[str] = settings.sets or ("",)
        if settings.sets and not evaluation and split_of(rank, settings.eval_fraction, {}) != EVAL:
            sets = filter(None, [set_of(rank, settings.eval_fraction, settings.sets)])
        for name in sets:
            left_out = not evaluation and rank in self._left_out
            yield name, None if left_out else Arrival(document.domain, rank, content, evaluation)


def _pack(
    reading: _Reading,
    tokens: Tokens,
    packers: Mapping[str, Packer],
    job: Job,
    done: Progress,
    processes: int,
    bar: "tqdm[Any]",
) -> None:
    """Pack everything behind what is done, and write down from time to time how far that is."""
    settings, saved = reading.settings, time.monotonic()
    with closing(encoded(tokens, reading.batches(done.place), processes)) as results:
        for batch, contents in results:
            done.bad += batch.bad
            arrivals: dict[str, list[Arrival]] = {name: [] for name in packers}
            for document, content in zip(batch.documents, contents, strict=True):
                if not content.cut(settings.sequence_length).learned.any():
                    place = f"{reading.inputs[document.place[0]].name}:{document.place[1]}"
                    done.bad.append(BadRecord(place, "its prompt alone fills a sample"))
                    continue
                for name, arrival in reading.sort(document, content):
                    if arrival is None:
                        packers[name].drop(document.domain)
                    else:
                        arrivals[name].append(arrival)
            for name, packer in packers.items():
                packer.add(arrivals[name])
            done.place = batch.place
            done.documents += len(batch.documents)
            bar.update(batch.position - bar.n)
            if len(done.bad) > _EARLY_STOP:
                _check_bad(done.bad, done.documents, settings.max_bad)
            if time.monotonic() - saved > _SAVE_SECONDS:
                job.save(packers, done)
                saved = time.monotonic()


def _finish(
    job: Job, packers: Mapping[str, Packer], recipe: _Recipe, tokenizer: PreTrainedTokenizerFast, out: Path | str
) -> dict[str, DataManifest]:
    """Complete the data and put them in their place."""
    manifests = {}
    for name, packer in packers.items():
        folder = job.data / name
        tokenizer.save_pretrained(folder / "tokenizer")
        files = sorted(path.name for path in (folder / "tokenizer").iterdir())
        try:
            manifests[name] = recipe.manifest(packer, files)
        except UserError as error:
            raise UserError(f"{name}: {error}" if name else str(error)) from None
        manifests[name].save(folder)
    put_in_place(job.data, Path(out).resolve())
    return manifests


def _check(settings: PackSettings, processes: int | None, shard: tuple[int, int] | None) -> None:
    if settings.sequence_length < 2:
        raise UserError(f"a sequence length of {settings.sequence_length} leaves nothing to predict: choose 2 or more")
    if processes is not None and processes < 1:
        raise UserError(f"{processes} processes can't do anything: choose 1 or more")
    if not 0 <= settings.max_bad <= 1:
        raise UserError(f"the share of bad records {settings.max_bad} must lie in [0, 1]")
    if not 0 <= settings.eval_fraction < 1:
        raise UserError(f"the evaluation fraction {settings.eval_fraction} must lie in [0, 1)")
    if settings.compression is not None and not is_compression(settings.compression):
        raise UserError(f"there is no compression '{settings.compression}': write zstd, or zstd:LEVEL")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise UserError(f"there is no part {shard[0]} of {shard[1]}: they are numbered from 0")
    for name, share in settings.sets.items():
        if clean_name(name) != name or not 0 < share <= 1:
            raise UserError(f"the set '{name}={share}' needs a name good for a folder and a share in (0, 1]")
    if sum(settings.sets.values()) > 1 + 1e-9:
        raise UserError(f"the sets take {sum(settings.sets.values()):g} of the documents: at most 1 can be given out")


def _part(inputs: list[Input], shard: tuple[int, int] | None) -> list[Input]:
    """The inputs of a part: every n-th file, and of each dataset the n-th part."""
    if shard is None:
        return inputs
    files = [source for source in inputs if not source.is_dataset]
    return [*files[shard[0] :: shard[1]], *(replace(source, part=shard) for source in inputs if source.is_dataset)]


def load_fast_tokenizer(tokenizer: Path | str) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a folder or the hub.

    Raises:
        UserError: there is none, or it is not fast.
    """
    try:
        loaded = AutoTokenizer.from_pretrained(str(tokenizer))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{tokenizer} has no usable tokenizer: give the folder of one, or a model's name on the hub "
            f"({first_line(error)})"
        ) from None
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise UserError(f"the tokenizer of {tokenizer} is not a fast one: convert it with transformers first")
    return loaded


def _tokens(tokenizer: PreTrainedTokenizerFast, settings: PackSettings, name: str) -> tuple[Tokens, Render | None]:
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


def _cores() -> int:
    """Cores that this process may use; fewer than the machine's under a container's limits."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_bad(bad: list[BadRecord], good: int, limit: float) -> None:
    if len(bad) > limit * (len(bad) + good):
        shown = "; ".join(f"{record.place}: {record.reason}" for record in bad[:3])
        raise UserError(
            f"{len(bad)} of {len(bad) + good} records can't be used, more than the {limit:.1%} allowed "
            f"by --max-bad: {shown}"
        )
