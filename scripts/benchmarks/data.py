"""What preparing and loading data cost."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.ratios import Ratio, interleaved


def data_prep(runs: int) -> Ratio:
    """Tokenising, packing and writing MDS against bare batch tokenisation of the same text on the same cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # the reference uses all cores
    from tokenizers import Tokenizer

    from data_prep.builtin import build_corpus
    from data_prep.pack import prepare
    from data_prep.recipe import PackSettings
    from data_prep.tokenizer import train_tokenizer
    from llmprune.data.records import find_inputs
    from llmprune.data.sources import Document, Fields, documents

    with tempfile.TemporaryDirectory() as folder:
        corpus, out = Path(folder) / "corpus", Path(folder) / "out"
        build_corpus(corpus, megabytes=24)
        tokenizer = train_tokenizer([corpus], Path(folder) / "tokenizer", vocab_size=8192, megabytes=8)
        texts = [d.text for d in documents(find_inputs([corpus]), Fields()) if isinstance(d, Document)]
        backend: Tokenizer = tokenizer.backend_tokenizer

        def bare() -> None:
            for start in range(0, len(texts), 100):
                for encoding in backend.encode_batch_fast(texts[start : start + 100], add_special_tokens=False):
                    encoding.ids  # noqa: B018 (a tokenisation whose ids nobody reads is none)

        def whole() -> None:
            prepare([corpus], Path(folder) / "tokenizer", out, PackSettings(1024), overwrite=True)

        size = sum(map(len, texts)) / 1e6
        return interleaved(whole, bare, runs, 1.35, f"{size:.0f} MB of text into MDS / bare batch tokenisation")


def mixed_loading(runs: int) -> Ratio:
    """Samples per second from four domains whose weights keep changing, over those of a plain StreamingDataset."""
    from streaming import Stream, StreamingDataset
    from torch.utils.data import DataLoader, default_collate

    from data_prep.builtin import build_corpus
    from data_prep.pack import prepare
    from data_prep.recipe import PackSettings
    from data_prep.tokenizer import train_tokenizer
    from llmprune.data.dataset import MixedDataset
    from llmprune.data.format import TOKENS
    from llmprune.data.mixing import integer_weights
    from llmprune.data.prepared import PreparedData

    batch, batches, workers, delay = 32, 300, 2, 8
    with tempfile.TemporaryDirectory() as folder:
        corpus, data = Path(folder) / "corpus", Path(folder) / "data"
        build_corpus(corpus, megabytes=24)
        train_tokenizer([corpus], Path(folder) / "tokenizer", vocab_size=8192, megabytes=8)
        prepare([corpus], Path(folder) / "tokenizer", data, PackSettings(512))
        mixed = MixedDataset(PreparedData(data), global_batch_size=batch, weights=None, seed=1)
        parts = [Stream(local=str(data / domain), split="train") for domain in mixed.domains]
        plain = StreamingDataset(streams=parts, batch_size=batch, shuffle=True)
        mixed_loader = DataLoader(mixed, batch_size=batch, num_workers=workers)

        def tokens_only(rows: list[dict[str, Any]]) -> Any:  # where documents begin differs in length
            return default_collate([row[TOKENS] for row in rows])

        plain_loader = DataLoader(
            plain, batch_size=batch, num_workers=workers, persistent_workers=True, collate_fn=tokens_only
        )

        def forever() -> Iterator[Any]:
            while True:
                yield from plain_loader

        ours, theirs, taken = iter(mixed_loader), forever(), 0

        def changing() -> None:
            nonlocal taken
            for _ in range(batches):
                if taken % 20 == 0:
                    shares = [1 + (taken // 20 + place) % 4 for place in range(len(mixed.domains))]
                    mixed.change_weights(integer_weights(shares), taken + delay)
                next(ours)
                taken += 1

        def steady() -> None:
            for _ in range(batches):
                next(theirs)

        work = f"samples/s of a changing mix of {len(parts)} domains / of a plain StreamingDataset, {workers} workers"
        return replace(interleaved(steady, changing, runs, 0.95, work), least=True)
