"""Prepared data for another tokenizer, such as that of a model with fewer tokens."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from data_prep.pack import Summary, prepare
from data_prep.recipe import PackSettings
from llmprune.data.format import EVAL, TRAIN
from llmprune.data.prepared import PreparedData
from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json, write_json
from llmprune.utils.outputs import refuse_existing, refuse_replacing
from llmprune.utils.untrusted import open_tokenizer

LONGEST = 1_000_000  # tokens of a document; longer ones, as in data without marks between documents, are divided


def reencode(
    data: Path | str,
    tokenizer: Path | str,
    out: Path | str,
    *,
    processes: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Summary:
    """Turn prepared data back into text, and prepare it with another tokenizer.

    Domains, splits, the length of samples and the marks around documents stay. A stopped job leaves hidden folders
    beside ``out``; the same call resumes from them.

    Args:
        data: folder or URL of prepared data.
        tokenizer: folder or hub name of the other tokenizer.
        out: folder to write.
        processes: number of tokenising processes; None = one per core.
        overwrite: whether ``out`` may be replaced.
        progress: whether to show the progress on standard error.

    Raises:
        UserError: the data are conversations, whose parts can't be told from their tokens, or can't be read.
    """
    prepared = PreparedData(data)
    manifest = prepared.manifest
    if manifest.conversations:
        raise UserError(f"{data} holds conversations: prepare them again from their records")
    refuse_replacing(out, [path for path in (Path(data), Path(tokenizer)) if path.exists()])
    refuse_existing(Path(out), overwrite)
    place = Path(out).resolve()
    texts = place.with_name(f".{place.name}.text")  # kept if the job is stopped, so that it resumes with the same files
    _write(prepared, texts)
    settings = PackSettings(
        manifest.sequence_length,
        eval_fraction=0.0,
        bos=manifest.bos,
        eos=manifest.eos,
        seed=manifest.seed,
        compression=manifest.compression,
    )
    held_out = [texts / EVAL] if (texts / EVAL).exists() else []
    try:
        found = prepare(
            [texts / TRAIN],
            tokenizer,
            out,
            settings,
            eval_inputs=held_out,
            processes=processes,
            overwrite=overwrite,
            progress=progress,
        )
    except UserError:
        shutil.rmtree(texts)
        raise
    shutil.rmtree(texts)
    return found


def _write(prepared: PreparedData, texts: Path) -> None:
    """Write the text of prepared data as JSON lines, unless it is there."""
    contents = {"data": prepared.manifest.fingerprint()}
    if (texts / "done.json").is_file() and read_json(texts / "done.json") == contents:
        return
    if texts.exists():
        shutil.rmtree(texts)
    before = open_tokenizer(prepared.tokenizer)
    for split in (TRAIN, EVAL):
        for domain in prepared.domains_with(split):
            file = texts / split / domain / "text.jsonl"
            file.parent.mkdir(parents=True)
            with file.open("w", encoding="utf-8") as lines:
                for text in _documents(prepared, domain, split, before):
                    lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            os.utime(file, (0, 0))  # written again, it is the same input for a job that was stopped
    write_json(texts / "done.json", contents)


def _documents(prepared: PreparedData, domain: str, split: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The texts of a domain's split."""
    manifest = prepared.manifest
    ends = [tokenizer.eos_token_id] if manifest.eos else []
    begins = [tokenizer.bos_token_id] if manifest.bos else []
    marks, around = ends or begins, [*ends, *begins]
    tokens: list[int] = []
    for token in _tokens(prepared, domain, split):
        if token not in around:
            tokens.append(token)
        if tokens and (token in marks or len(tokens) >= LONGEST):
            yield tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
            tokens = []
    if tokens:
        yield tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def _tokens(prepared: PreparedData, domain: str, split: str) -> Iterator[int]:
    reader = prepared.reader(domain, split)
    for shard, samples in enumerate(reader.shard_sizes):
        for place in range(samples):
            yield from reader.read(shard, place)["input_ids"].tolist()
