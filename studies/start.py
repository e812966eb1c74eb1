"""What it takes to begin: seconds and memory until the first batch, over data of up to ten million samples.

Only the index is of that size: all shards are one file under many names. A plain StreamingDataset stands beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

LENGTH, BATCH = 16, 32
CASES = ((100_000, 25), (10_000_000, 25), (100_000, 2500), (10_000_000, 2500))  # samples, shards


def make(folder: Path, samples: int, shards: int) -> None:
    """Prepared data of one domain, whose shards are all the same file."""
    from transformers import PreTrainedTokenizerFast

    from data_prep.join import Row
    from data_prep.shards import ShardWriter
    from llmprune.data.format import STARTS, TOKENS, DataManifest, SplitCounts, columns, tokenizer_fingerprint
    from llmprune.utils.files import write_json

    split, each = folder / "only" / "train", samples // shards
    writer = ShardWriter(split, columns(LENGTH, "uint16", conversations=False))
    row: Row = {TOKENS: np.arange(LENGTH, dtype=np.uint16), STARTS: np.zeros(1, np.uint32)}
    writer.write([row] * each)
    writer.finish()
    (first,) = json.loads((split / "index.json").read_text())["shards"]
    (split / first["raw_data"]["basename"]).rename(split / "shard.mds")
    described = []
    for number in range(shards):
        name = f"shard.{number:05}.mds"
        os.link(split / "shard.mds", split / name)
        described.append({**first, "raw_data": {**first["raw_data"], "basename": name}})
    write_json(split / "index.json", {"version": 2, "shards": described})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), eos_token="0")
    tokenizer.save_pretrained(folder / "tokenizer")
    DataManifest(
        sequence_length=LENGTH,
        dtype="uint16",
        tokenizer=tokenizer_fingerprint(tokenizer),
        vocab_size=LENGTH,
        bos=False,
        eos=False,
        seed=17,
        domains={"only": {"train": SplitCounts(samples, samples * LENGTH, samples)}},
        conversations=False,
        compression=None,
        tokenizer_files=sorted(path.name for path in (folder / "tokenizer").iterdir()),
        contents="",
    ).save(folder)


def begin(folder: Path, kind: str) -> None:
    """Read the first batch in this process and print what it took beyond the imports: seconds and MB."""
    from streaming import StreamingDataset

    from llmprune.data.dataset import MixedDataset
    from llmprune.data.prepared import PreparedData

    before = _memory()
    start = time.perf_counter()
    if kind == "mixed":
        stream = iter(MixedDataset(PreparedData(folder), global_batch_size=BATCH, weights=None, seed=1))
    else:
        stream = iter(StreamingDataset(local=str(folder / "only"), split="train", batch_size=BATCH, shuffle=True))
    for _ in range(BATCH):
        next(stream)
    print(json.dumps([time.perf_counter() - start, _memory() - before]), flush=True)
    os._exit(0)  # no thread of a loader holds this up


def _memory() -> float:
    return float(psutil.Process().memory_info().rss) / 2**20


def _tokenizer() -> object:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({str(number): number for number in range(LENGTH)}, unk_token="0"))


def main() -> int:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--begin", nargs=2, metavar=("FOLDER", "KIND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.begin:
        begin(Path(arguments.begin[0]), arguments.begin[1])
    print("| samples | shards | seconds | MB | StreamingDataset: seconds | MB |")
    print("|---|---|---|---|---|---|")
    for samples, shards in CASES:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), samples, shards)
            cells = []
            for kind in ("mixed", "plain"):
                command = [sys.executable, __file__, "--begin", folder, kind]
                made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
                cells += json.loads(made.stdout.splitlines()[-1])
        seconds, memory, plain_seconds, plain_memory = cells
        print(
            f"| {samples:,} | {shards:,} | {seconds:.2f} | {memory:.0f} | {plain_seconds:.2f} | {plain_memory:.0f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
