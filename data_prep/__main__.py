"""The command ``python -m data_prep``: it only delegates."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from llmprune.data.sources import BadRecord, Fields
from llmprune.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Inputs = Annotated[list[Path], typer.Argument(help="Files or folders: .txt, .md, .jsonl; also .gz and .zst.")]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
TextField = Annotated[str, typer.Option(help="Field with the text; nested: a.b")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]


@app.callback()
def data_prep() -> None:
    """Turn text into training data."""


@app.command()
def corpus(
    out: Out,
    megabytes: Annotated[float, typer.Option(help="Limit in all.")] = 16.0,
    seed: Annotated[int, typer.Option(help="Of the order of documents.")] = 17,
    overwrite: Overwrite = False,
) -> None:
    """Write the built-in corpus as JSON lines, a folder per domain. No network is needed."""
    from data_prep.builtin import build_corpus

    for domain, size in sorted(build_corpus(out, megabytes=megabytes, seed=seed, overwrite=overwrite).items()):
        print(f"{domain:12} {size / 1e6:8.2f} MB")


@app.command()
def tokenizer(
    inputs: Inputs,
    out: Out,
    vocab_size: Annotated[int, typer.Option(help="Tokens in all.")] = 32000,
    megabytes: Annotated[float, typer.Option(help="How much text to read, at most.")] = 100.0,
    text_field: TextField = "text",
    overwrite: Overwrite = False,
) -> None:
    """Train a byte-level BPE tokenizer."""
    from data_prep.tokenizer import train_tokenizer

    bad: list[BadRecord] = []
    trained = train_tokenizer(
        inputs, out, vocab_size=vocab_size, megabytes=megabytes, text_field=text_field, overwrite=overwrite, bad=bad
    )
    print(f"{out}: {len(trained)} tokens")
    _print_skipped(bad)


@app.command()
def tokenize(
    inputs: Inputs,
    out: Out,
    tokenizer: Annotated[str, typer.Option(help="Folder or hub name of the model whose tokenizer to use.")],
    sequence_length: Annotated[int, typer.Option(help="Tokens per sample.")] = 2048,
    text_field: TextField = "text",
    domain: Annotated[str | None, typer.Option(help="One domain for everything.")] = None,
    domain_field: Annotated[str | None, typer.Option(help="Field with the domain; default: the folder's name.")] = None,
    eval_fraction: Annotated[float, typer.Option(help="Share of the documents kept for evaluation.")] = 0.01,
    bos: Annotated[bool, typer.Option(help="BOS before every document.")] = False,
    eos: Annotated[bool, typer.Option(help="EOS after every document.")] = True,
    processes: Annotated[int | None, typer.Option(help="Default: one per core.")] = None,
    max_bad: Annotated[float, typer.Option(help="Share of unreadable records to put up with.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 17,
    overwrite: Overwrite = False,
) -> None:
    """Tokenise documents, pack them into samples and write MDS shards, a folder per domain."""
    from data_prep.describe import table
    from data_prep.pack import PackSettings, prepare

    if domain is not None and domain_field is not None:
        raise UserError("give --domain or --domain-field, not both")
    summary = prepare(
        inputs,
        tokenizer,
        out,
        PackSettings(sequence_length, eval_fraction, bos, eos, max_bad, seed),
        fields=Fields(text_field, domain_field, domain),
        processes=processes,
        overwrite=overwrite,
        progress=True,
    )
    print("\n".join(table(summary.manifest)))
    for name, splits in summary.manifest.domains.items():
        if eval_fraction and "eval" not in splits:
            print(f"{name:20} has no evaluation sample: that takes four samples of text, in several documents")
    _print_skipped(summary.bad)


@app.command()
def describe(
    data: Annotated[Path, typer.Argument(help="A folder that `tokenize` made.")],
    samples: Annotated[int, typer.Option(help="Samples of each domain and split to show as text.")] = 1,
    domain: Annotated[str | None, typer.Option(help="Show samples of this domain alone.")] = None,
    seed: Annotated[int, typer.Option(help="Of their choice.")] = 17,
) -> None:
    """Print what prepared data hold, and some of their samples as text."""
    from data_prep.describe import show_samples, table
    from llmprune.data.format import DataManifest

    manifest = DataManifest.load(data)
    special = " and ".join(name for name, used in (("BOS", manifest.bos), ("EOS", manifest.eos)) if used)
    print(f"{data}: samples of {manifest.sequence_length} tokens, vocabulary {manifest.vocab_size:,}")
    print(f"every document has {special or 'neither BOS nor EOS'}")
    print("\n".join(table(manifest)))
    for shown in show_samples(data, samples, domain=domain, seed=seed):
        print(f"\n--- {shown.domain}, {shown.split}, sample {shown.number}\n{shown.text}")


def main() -> None:
    """Run the command; a mistake of the user's is one line on standard error and exit code 2."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.exit(2)


def _print_skipped(bad: list[BadRecord]) -> None:
    for record in bad[:10]:
        print(f"skipped {record.place}: {record.reason}", file=sys.stderr)
    if len(bad) > 10:
        print(f"… {len(bad)} records skipped in all", file=sys.stderr)


def _terminate(number: int, frame: FrameType | None) -> None:
    """End on a signal as on Ctrl-C: workers and unfinished output go with the command."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
