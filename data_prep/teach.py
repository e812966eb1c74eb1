"""A teacher's predictions stored with the tokens of prepared data, so that training needs no teacher in memory.

The work is divided into pieces, which processes share (see ``SharedJob``); each becomes one shard.
"""

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate
from transformers import PreTrainedModel

from data_prep.join import Row
from data_prep.shards import ShardWriter
from data_prep.shared_job import SharedJob
from llmprune.data.format import (
    EVAL,
    TEACHER_LOGS,
    TEACHER_TOKENS,
    TRAIN,
    DataManifest,
    columns,
    token_dtype,
    tokenizer_fingerprint,
)
from llmprune.data.prepared import PreparedData
from llmprune.data.reader import SplitReader
from llmprune.models.causal_lm import final_states
from llmprune.models.enough_memory import check_memory
from llmprune.models.loading import load_model, load_model_config, load_tokenizer
from llmprune.models.number_formats import dtype_for_inference
from llmprune.models.objectives import likeliest
from llmprune.utils.errors import UserError
from llmprune.utils.files import sha256_text
from llmprune.utils.formats import TeacherFormat
from llmprune.utils.outputs import output_folder, refuse_existing
from llmprune.utils.progress import Progress
from llmprune.utils.ranks import use_own_gpu
from llmprune.utils.settings import check_settings, limited

log = logging.getLogger(__name__)

_PIECE_BYTES = 1 << 27


@dataclass
class TeachConfig:
    """Settings for storing a teacher's predictions.

    Attributes:
        top_k: number of most probable tokens stored per position, each with its log-probability, float32.
        temperature: divisor of the logits.
        boundaries: whether attention restarts at each document; None = only for conversations.
        batch_size: number of samples per forward pass.
        dtype: dtype of the teacher's weights: bfloat16 or float32; auto = bfloat16 on GPUs and on processors that have
            it.
    """

    top_k: int = 64
    temperature: float = limited(1.0, above=0)
    boundaries: bool | None = None
    batch_size: int = limited(8, least=1)
    dtype: TeacherFormat = "auto"

    def check(self, vocabulary: int) -> None:
        """Raise ``UserError`` for values that are out of range."""
        check_settings(self)
        if not 1 <= self.top_k < vocabulary:
            raise UserError(
                f"--top-k is {self.top_k}; it must be positive and below the vocabulary's size, {vocabulary}"
            )


@dataclass(frozen=True)
class _Piece:
    """A range of samples of one split of one domain."""

    domain: str
    split: str
    number: int
    samples: range

    @property
    def name(self) -> str:
        return f"{self.domain}/{self.split}/{self.number:05}"


def teach(data: str, teacher: str, out: Path, config: TeachConfig, *, overwrite: bool = False) -> None:
    """Write a copy of prepared data, with a teacher's predictions for the tokens of the training splits.

    Args:
        data: folder or URL of data from ``python -m data_prep tokenize`` or ``conversations``.
        teacher: Hugging Face folder or hub name of the teacher; its tokenizer made the data.
        out: folder to write.
        config: settings for storing predictions.
        overwrite: whether ``out`` may be replaced.

    Raises:
        UserError: the inputs do not fit each other, or ``out`` exists.
    """
    prepared = PreparedData(data)
    manifest = prepared.manifest
    if manifest.teacher is not None:
        raise UserError(f"{data} has a teacher's predictions already ({manifest.teacher['model']})")
    model_config = load_model_config(teacher)
    config.check(model_config.vocab_size)
    if tokenizer_fingerprint(load_tokenizer(teacher)) != manifest.tokenizer:
        raise UserError(f"the tokenizer of {teacher} did not make the data in {data}: take another teacher")
    boundaries = manifest.conversations if config.boundaries is None else config.boundaries
    use_own_gpu()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype_for_inference(config.dtype, on_gpu=device.type == "cuda")
    facts = {
        "data": manifest.fingerprint(),
        "model": teacher,
        "vocab_size": model_config.vocab_size,
        "top_k": config.top_k,
        "temperature": config.temperature,
        "boundaries": boundaries,
        "dtype": str(dtype).removeprefix("torch."),
    }

    def finished() -> bool:
        return not overwrite and (out / "manifest.json").is_file() and DataManifest.load(out).teacher == facts

    if finished():
        return
    refuse_existing(out, overwrite)
    work = _Work(prepared, config, boundaries, token_dtype(model_config.vocab_size))
    job = SharedJob(out, "teach", facts, [*work.pieces], finished)
    if job.finished:
        return
    if not job.is_done:
        check_memory(teacher, dtype=dtype, on_gpu=device.type == "cuda", remedy="use a larger machine")
        model = load_model(teacher, dtype=dtype).to(device).eval()
        total, done = (sum(len(work.pieces[name].samples) for name in some) for some in (work.pieces, job.done))
        with Progress(desc="teaching", total=total, initial=done, unit="samples") as progress:

            def do(piece: str) -> dict[str, Any]:
                return work.do(piece, job.folder, model, progress.update)

            job.work(do)
    with job.finishing() as mine:
        if mine:
            _finish(prepared, work, job, facts, out, overwrite)


class _Work:
    """The pieces of a job, and their shards."""

    def __init__(self, data: PreparedData, config: TeachConfig, boundaries: bool, ids: str) -> None:
        self._ids = ids  # dtype of token ids: a teacher's vocabulary may be larger than its tokenizer's
        self._data, self._config, self._boundaries = data, config, boundaries
        manifest = data.manifest
        self._plain = columns(manifest.sequence_length, manifest.dtype, conversations=manifest.conversations)
        shape = f"{manifest.sequence_length},{config.top_k}"
        self._taught = {
            **self._plain,
            TEACHER_TOKENS: f"ndarray:{ids}:{shape}",
            TEACHER_LOGS: f"ndarray:float32:{shape}",
        }
        self.splits = [(domain, split) for split in (TRAIN, EVAL) for domain in data.domains_with(split)]
        self.pieces = {piece.name: piece for split in self.splits for piece in self._pieces(*split)}

    def _pieces(self, domain: str, split: str) -> Iterator[_Piece]:
        samples = self._data.manifest.samples(domain, split)
        kept = self._config.top_k * 8 if split == TRAIN else 0
        each = max(1, _PIECE_BYTES // (self._data.manifest.sequence_length * (kept + 8)))
        for number, start in enumerate(range(0, samples, each)):
            yield _Piece(domain, split, number, range(start, min(start + each, samples)))

    def do(self, name: str, folder: Path, model: PreTrainedModel, told: Callable[[int], object]) -> dict[str, Any]:
        """Write a piece's shard to the folder of the job; returns the description of the shard."""
        piece = self.pieces[name]
        reader = self._data.reader(piece.domain, piece.split, boundaries=self._boundaries)
        began = time.monotonic()
        places = [(shard, index) for shard, size in enumerate(reader.shard_sizes) for index in range(size)]
        own = [places[number] for number in piece.samples]
        aside = folder / "work" / name
        shutil.rmtree(aside, ignore_errors=True)
        taught = piece.split == TRAIN
        compression = self._data.manifest.compression
        writer = ShardWriter(aside, self._taught if taught else self._plain, compression)
        for start in range(0, len(own), self._config.batch_size):
            batch = own[start : start + self._config.batch_size]
            writer.write(self._rows(reader, batch, model if taught else None))
            told(len(batch))
        writer.finish()
        (shard,) = writer.shards
        target = _shards(folder, name)
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.rename(target)
        alike = [other for other in self.pieces.values() if (other.domain, other.split) == (piece.domain, piece.split)]
        rate = len(own) * self._data.manifest.sequence_length / max(time.monotonic() - began, 1e-9)
        log.info(
            "%s, %s: piece %d of %d is done, %.0f tokens/s",
            piece.domain,
            piece.split,
            piece.number + 1,
            len(alike),
            rate,
        )
        return shard

    def _rows(self, reader: SplitReader, places: list[tuple[int, int]], model: PreTrainedModel | None) -> list[Row]:
        rows: list[Row] = [dict(reader.row(*place)) for place in places]
        if model is not None:
            batch = default_collate([reader.read(*place) for place in places])
            tokens, logs = predictions(model, batch, self._config.top_k, self._config.temperature)
            narrow = tokens.astype(self._ids)
            for row, *own in zip(rows, narrow, logs, strict=True):
                row |= dict(zip((TEACHER_TOKENS, TEACHER_LOGS), own, strict=True))
        return rows


@torch.no_grad()
def predictions(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], top_k: int, temperature: float
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A model's most probable tokens and their log-probabilities, both [batch, length, k]; see ``likeliest``."""
    states, head = final_states(model, {name: value.to(model.device) for name, value in batch.items()})
    parts = [likeliest(head.logits(states[part]), top_k, temperature) for part in head.chunks(len(states))]
    shape = (*batch["input_ids"].shape, top_k)
    tokens, logs = (torch.cat(pieces).view(shape).cpu().numpy() for pieces in zip(*parts, strict=True))
    return tokens, logs


def _shards(folder: Path, piece: str) -> Path:
    """The folder with a piece's shard."""
    return folder / "shards" / piece


def _finish(
    data: PreparedData, work: _Work, job: SharedJob, facts: Mapping[str, Any], out: Path, overwrite: bool
) -> None:
    """Join the pieces."""
    checksums: list[str] = []
    with output_folder(out, overwrite) as made:
        for domain, split in work.splits:
            writer = ShardWriter(made / domain / split, {})
            for name, piece in work.pieces.items():
                if (piece.domain, piece.split) == (domain, split):
                    shard = job.result(name)
                    writer.adopt(shard, _shards(job.folder, name), move=False)
                    checksums += shard["raw_data"]["hashes"].values()
            writer.finish()
        shutil.copytree(data.tokenizer, made / "tokenizer")
        contents = sha256_text(" ".join(checksums))
        dataclasses.replace(data.manifest, contents=contents, teacher=dict(facts)).save(made)
