"""Packing documents into MDS shards of samples with a fixed length."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from data_prep.encode import Tokens, encoded
from data_prep.job import PackingJob, Progress, opened_job
from data_prep.packer import Arrival, Layout, Packer
from data_prep.reading import EARLY_STOP, Reading, part_of
from data_prep.recipe import PackSettings, Recipe, load_fast_tokenizer, tokens_of
from llmprune.data.format import DataManifest
from llmprune.data.records import Input, find_inputs
from llmprune.data.sources import BadRecord, DomainNames, Fields
from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json
from llmprune.utils.outputs import put_in_place, refuse_existing, refuse_replacing
from llmprune.utils.progress import Progress as ProgressBar
from llmprune.utils.untrusted import open_tokenizer

log = logging.getLogger(__name__)

_SAVE_SECONDS = 60.0  # seconds between two saves of a job's progress


@dataclass
class Summary:
    """The result of a job: the manifest of each set (a single one has the name "") and the skipped records."""

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
    number of processes. Equal texts go to the same split. An incomplete last sample of text is dropped.

    A stopped or killed job leaves a hidden folder beside ``out``; the same call resumes from it.

    Args:
        inputs: files, folders, and datasets (``hf:NAME:CONFIG:SPLIT``).
        tokenizer: folder or hub name of a fast tokenizer.
        out: folder to write (see ``llmprune.data.format``).
        settings: settings of packing.
        fields: names of the records' fields; None = the default names.
        eval_inputs: inputs that are kept for evaluation, instead of a share of ``inputs``; their texts are left out of
            training.
        shard: pair (i, n): process only part i of n parts, which ``merge`` joins; None = everything.
        processes: number of tokenising processes; None = one per core, 1 = this process.
        overwrite: whether ``out`` may be replaced.
        progress: whether to show the progress on standard error.

    Raises:
        UserError: inputs, tokenizer or settings are impossible; the output would replace inputs; there are too many bad
            records, or not enough text for one sample.
    """
    settings = replace(settings, eval_fraction=0.0) if eval_inputs else settings
    held_out, found = (find_inputs(names) if names else [] for names in (eval_inputs, inputs))
    read = [source.path for source in (*held_out, *found) if source.path is not None]
    named = [path for path in map(Path, (*inputs, *eval_inputs, tokenizer)) if path.exists()]  # others are hub names
    refuse_replacing(out, [*named, *read])
    refuse_existing(Path(out), overwrite)
    settings.check()
    _check_numbers(processes, shard)
    loaded = load_fast_tokenizer(tokenizer)
    tokens, render = tokens_of(loaded, settings, str(tokenizer))
    reading = Reading(part_of(held_out, shard), part_of(found, shard), settings, fields or Fields(), render)
    if shard and not reading.training:
        raise UserError(f"part {shard[0]} of {shard[1]} has no input: there are fewer files than parts")
    recipe = Recipe.of(settings, loaded, settle=shard is None)
    with opened_job(out, _describe(recipe, reading, found, held_out, shard), overwrite=overwrite) as job:
        packers = recipe.packers(job)
        done = _go_on(job, packers, reading, tokens, held_out, processes or _cores(), progress=progress)
        if shard is None:
            return Summary(_finish(job, packers, recipe, loaded, out, overwrite), done.bad)
        job.save(packers, replace(done, complete=True))
        loaded.save_pretrained(job.folder / "tokenizer")
        put_in_place(job.folder, Path(out).resolve(), overwrite)
        return Summary({}, done.bad)


def _check_numbers(processes: int | None, shard: tuple[int, int] | None) -> None:
    if processes is not None and processes < 1:
        raise UserError(f"{processes} processes can't do anything: choose 1 or more")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise UserError(f"there is no part {shard[0]} of {shard[1]}: they are numbered from 0")


def _describe(
    recipe: Recipe, reading: Reading, found: list[Input], held_out: list[Input], shard: tuple[int, int] | None
) -> dict[str, Any]:
    """Description of a job; a stopped job resumes only with the same description.

    Args:
        recipe: recipe of the data.
        reading: reader of the inputs of this part.
        found: inputs of all parts.
        held_out: inputs for evaluation.
        shard: number of this part and number of parts; None = the job has no parts.
    """
    return {
        "recipe": asdict(recipe),
        "inputs": [asdict(source) for source in reading.training],
        "eval_inputs": [asdict(source) for source in held_out],
        "whole": [[[Path(one.name).name, one.folder, one.size] for one in given] for given in (found, held_out)],
        "fields": asdict(reading.fields),
        "shard": None if shard is None else list(shard),
    }


def merge_prepared(parts: Sequence[Path | str], out: Path | str, *, overwrite: bool = False) -> Summary:
    """Join all parts of a job into prepared data. Shards are hard-linked if the file system allows it.

    Args:
        parts: folders that ``prepare`` wrote with ``shard``, in any order.
        out: folder to write.
        overwrite: whether ``out`` may be replaced.

    Raises:
        UserError: a part is missing, is given twice, or belongs to another job.
    """
    refuse_replacing(out, parts)
    jobs: dict[int, PackingJob] = {}
    recipes, count = [], 0
    for path in map(Path, parts):
        description = read_json(path / "job.json") if (path / "job.json").is_file() else {}
        if not description.get("shard"):
            raise UserError(f"{path} is no part of a job: make it with --shard")
        number, count = description["shard"]
        if number in jobs:
            raise UserError(f"{path} and {jobs[number].folder} are the same part, {number} of {count}")
        jobs[number] = PackingJob(path)
        if not jobs[number].is_complete:
            raise UserError(f"{path} was stopped before its end: call its command again")
        recipes.append({key: description[key] for key in ("recipe", "fields", "whole")})
    if any(recipe != recipes[0] for recipe in recipes):
        raise UserError("the parts were made with different settings, tokenizers or inputs")
    if missing := sorted(set(range(count)) - jobs.keys()):
        raise UserError(f"of {count} parts these are missing: {', '.join(map(str, missing))}")
    recipe = Recipe(**{**recipes[0]["recipe"], "layout": Layout(**recipes[0]["recipe"]["layout"])})
    described = {"recipe": asdict(recipe), "parts": [str(jobs[number].folder.resolve()) for number in sorted(jobs)]}
    bad: list[BadRecord] = []
    names = DomainNames()
    with opened_job(out, described, overwrite=overwrite) as job:
        packers = recipe.packers(job)
        job.resume(packers)
        for number in sorted(jobs):
            part = jobs[number]
            progress, state = part.load()
            bad += progress.bad
            for original in progress.names.values():
                names.clean(original)
            for name, packer in packers.items():
                packer.absorb(state / (name or "all"), part.data / name)
        tokenizer = open_tokenizer(jobs[0].folder / "tokenizer")
        return Summary(_finish(job, packers, recipe, tokenizer, out, overwrite), bad)


def _go_on(
    job: PackingJob,
    packers: Mapping[str, Packer],
    reading: Reading,
    tokens: Tokens,
    held_out: list[Input],
    processes: int,
    *,
    progress: bool,
) -> Progress:
    """Pack the documents that are not packed yet; texts of ``held_out`` are left out of training.

    Raises:
        UserError: too many records can't be used.
    """
    done = job.resume(packers)
    reading.names = DomainNames(done.names)
    reading.leave_out(held_out)
    total, read = (sum(source.size for source in part) for part in (reading.inputs, reading.inputs[: done.place[0]]))
    with ProgressBar(desc="packing", total=total, initial=read, unit="B", disable=not progress) as bar:
        _pack(reading, tokens, packers, job, done, processes, bar)
    _check_bad(done.bad, done.documents, reading.settings.max_bad)
    return done


def _pack(
    reading: Reading,
    tokens: Tokens,
    packers: Mapping[str, Packer],
    job: PackingJob,
    done: Progress,
    processes: int,
    bar: ProgressBar,
) -> None:
    """Pack all documents after those in ``done``, and save the progress regularly."""
    settings, saved = reading.settings, time.monotonic()
    with closing(encoded(tokens, reading.batches(done.place), processes)) as results:
        for batch, contents in results:
            done.bad += batch.bad
            arrivals: dict[str, list[Arrival]] = {name: [] for name in packers}
            for document, content in zip(batch.documents, contents, strict=True):
                if not content.cut(settings.sequence_length).learned.any():
                    place = f"{reading.inputs[document.place[0]].name}:{document.place[1]}"
                    reason = (
                        "its prompt alone fills a sample" if len(content.ids) else "the tokenizer leaves nothing of it"
                    )
                    done.bad.append(BadRecord(place, reason))
                    continue
                for name, arrival in reading.sort(document, content):
                    if arrival is None:
                        packers[name].drop(document.domain)
                    else:
                        arrivals[name].append(arrival)
            for name, packer in packers.items():
                packer.add(arrivals[name])
                for (domain, split), documents in batch.empty.items():
                    packer.pass_over(domain, split, documents)
            done.place = batch.place
            done.documents += len(batch.documents)
            done.names = reading.names.originals
            bar.update(batch.position - bar.n)
            if len(done.bad) > EARLY_STOP:
                _check_bad(done.bad, done.documents, settings.max_bad)
            if time.monotonic() - saved > _SAVE_SECONDS:
                job.save(packers, done)
                saved = time.monotonic()
                for domain, documents, samples in (one for packer in packers.values() for one in packer.progress()):
                    log.info("%s: %s documents, %s samples so far", domain, f"{documents:,}", f"{samples:,}")
    bar.update((bar.total or bar.n) - bar.n)


def _finish(
    job: PackingJob,
    packers: Mapping[str, Packer],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    out: Path | str,
    overwrite: bool,
) -> dict[str, DataManifest]:
    """Complete the data and move them to ``out``."""
    manifests = {}
    for name, packer in packers.items():
        folder = job.data / name
        tokenizer.save_pretrained(folder / "tokenizer")
        files = sorted(path.name for path in (folder / "tokenizer").iterdir())
        try:
            manifests[name] = recipe.manifest(packer, files)
        except UserError as error:
            job.give_up()  # the same command would fail again
            raise UserError(f"{name}: {error}" if name else str(error)) from None
        manifests[name].save(folder)
    put_in_place(job.data, Path(out).resolve(), overwrite)
    return manifests


def _cores() -> int:
    """Number of cores that this process may use; it may be smaller than the machine's in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_bad(bad: list[BadRecord], good: int, limit: float) -> None:
    if len(bad) > limit * (len(bad) + good):
        shown = "; ".join(f"{record.place}: {record.reason}" for record in bad[:3])
        raise UserError(
            f"{len(bad)} of {len(bad) + good} records can't be used, more than the {limit:.1%} allowed "
            f"by --max-bad: {shown}"
        )
