"""The command ``python -m data_prep``: it only delegates."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llmprune.data.sources import BadRecord, Fields
from llmprune.utils.errors import UserError, check_surroundings, one_line
from llmprune.utils.formats import Device, TeacherFormat
from llmprune.utils.processes import end_on_signals, end_with_launcher
from llmprune.utils.programs import run_program

if TYPE_CHECKING:
    from data_prep.pack import Summary
    from data_prep.recipe import PackSettings

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Inputs = Annotated[
    list[str],
    typer.Argument(help="Files or folders (.txt, .md, .jsonl, also .gz and .zst; .parquet), or hf:NAME:CONFIG:SPLIT."),
]
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
    """Write the built-in corpus as JSON lines, one folder per domain. No network is needed."""
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


Tokenizer = Annotated[str, typer.Option(help="Folder or hub name of the model whose tokenizer to use.")]
SequenceLength = Annotated[int, typer.Option(help="Tokens per sample.")]
Domain = Annotated[str | None, typer.Option(help="One domain for everything.")]
DomainField = Annotated[str | None, typer.Option(help="Field with the domain; default: the folder's name.")]
EvalFraction = Annotated[float, typer.Option(help="Share of the documents kept for evaluation.")]
EvalInputs = Annotated[
    list[str] | None,
    typer.Option(help="Repeated: keep this for evaluation, and not a share; its texts are left out of training."),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="NAME=SHARE, repeated: sets of documents, none of which is in two.")
]
Shard = Annotated[str | None, typer.Option(help="i/n: do only part i of n; `merge` joins them.")]
Compression = Annotated[str | None, typer.Option(help="Of the shards: zstd, or zstd:LEVEL.")]
Processes = Annotated[int | None, typer.Option(help="Default: one per core.")]
MaxBad = Annotated[float, typer.Option(help="Share of unusable records to put up with.")]
Seed = Annotated[int, typer.Option(help="Of the split and of the sets.")]


@app.command()
def tokenize(
    inputs: Inputs,
    out: Out,
    tokenizer: Tokenizer,
    sequence_length: SequenceLength = 2048,
    text_field: TextField = "text",
    domain: Domain = None,
    domain_field: DomainField = None,
    eval_fraction: EvalFraction = 0.01,
    eval_inputs: EvalInputs = None,
    sets: Sets = None,
    bos: Annotated[bool, typer.Option(help="BOS before every document.")] = False,
    eos: Annotated[bool, typer.Option(help="EOS after every document.")] = True,
    shard: Shard = None,
    compression: Compression = None,
    processes: Processes = None,
    max_bad: MaxBad = 0.01,
    seed: Seed = 17,
    overwrite: Overwrite = False,
) -> None:
    """Tokenise documents, pack them into samples and write MDS shards, one folder per domain.

    A stopped job resumes when the same command is called again.
    """
    from data_prep.recipe import PackSettings

    settings = PackSettings(
        sequence_length, eval_fraction, bos, eos, max_bad, seed, compression=compression, sets=_shares(sets or [])
    )
    fields = Fields(text_field, domain_field, domain)
    _prepare(inputs, tokenizer, out, settings, fields, eval_inputs, shard, processes, overwrite)


@app.command()
def conversations(
    inputs: Inputs,
    out: Out,
    tokenizer: Tokenizer,
    template: Annotated[
        str, typer.Option(help="chat (the tokenizer's), alpaca, none, or a file with {prompt} and {input}.")
    ] = "chat",
    sequence_length: SequenceLength = 2048,
    prompt_field: Annotated[str, typer.Option(help="Field with the prompt.")] = "prompt",
    input_field: Annotated[str, typer.Option(help="Field with what the prompt is about.")] = "input",
    response_field: Annotated[str, typer.Option(help="Field with the response.")] = "response",
    messages_field: Annotated[
        str, typer.Option(help="Field with chat messages, where a record has them.")
    ] = "messages",
    domain: Domain = None,
    domain_field: DomainField = None,
    eval_fraction: EvalFraction = 0.01,
    eval_inputs: EvalInputs = None,
    sets: Sets = None,
    bos: Annotated[bool, typer.Option(help="BOS before every conversation; a chat template has its own.")] = False,
    eos: Annotated[bool, typer.Option(help="EOS after every response; a chat template has its own.")] = True,
    shard: Shard = None,
    compression: Compression = None,
    processes: Processes = None,
    max_bad: MaxBad = 0.01,
    seed: Seed = 17,
    overwrite: Overwrite = False,
) -> None:
    """Tokenise and pack prompts and responses, or chat messages, as whole conversations; only responses are learned."""
    from data_prep.conversations import ConversationSettings
    from data_prep.recipe import PackSettings

    made = ConversationSettings(template, prompt_field, input_field, response_field, messages_field)
    settings = PackSettings(
        sequence_length, eval_fraction, bos, eos, max_bad, seed, compression, _shares(sets or []), conversations=made
    )
    fields = Fields(domain_field=domain_field, domain=domain)
    _prepare(inputs, tokenizer, out, settings, fields, eval_inputs, shard, processes, overwrite)


@app.command()
def merge(
    parts: Annotated[list[Path], typer.Argument(help="What --shard 0/n … n-1/n wrote.")],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Join the parts of a job into prepared data."""
    from data_prep.pack import merge_prepared as merge_parts

    _print_summary(merge_parts(parts, out, overwrite=overwrite))


@app.command()
def teach(
    data: Annotated[str, typer.Argument(help="A folder that `tokenize` or `conversations` made, or a URL.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub name of the model to learn from.")],
    out: Out,
    top_k: Annotated[int, typer.Option(help="Likeliest tokens kept at every position, 6 to 8 bytes each.")] = 64,
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 1.0,
    document_boundaries: Annotated[
        bool | None, typer.Option(help="Attention restarts at each document; default: for conversations.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples of a forward pass.")] = 8,
    dtype: Annotated[
        TeacherFormat, typer.Option(help="Of the teacher's weights; auto = bfloat16 where it is fast.")
    ] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Write a copy of prepared data with a teacher's predictions, so that training needs no teacher in memory.

    Processes with the same command share the work; stopped work resumes when the same command is called again.
    """
    from data_prep.teach import TeachConfig
    from data_prep.teach import teach as write

    write(
        data,
        teacher,
        out,
        TeachConfig(top_k, temperature, document_boundaries, batch_size, dtype),
        overwrite=overwrite,
    )
    print(out)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the model that writes.")],
    out: Out,
    tokens: Annotated[int, typer.Option(help="Tokens to write in all.")],
    length: Annotated[int, typer.Option(help="Tokens of a text, at most.")] = 512,
    first_token: Annotated[
        Literal["random", "sampled"],
        typer.Option(help="random: any token, then the three likeliest; or like the rest."),
    ] = "random",
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 0.8,
    temperature_start: Annotated[
        float | None, typer.Option(help="Divides the logits of a text's first token; default: the temperature.")
    ] = None,
    fall: Annotated[int, typer.Option(help="Tokens from --temperature-start to --temperature.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Texts that are written at the same time.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 17,
    dtype: Annotated[TeacherFormat, typer.Option(help="Of the weights; auto = bfloat16 where it is fast.")] = "auto",
    device: Annotated[Device | None, typer.Option(help="cpu or gpu; default: gpu if there is one.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write text that a model makes up, as JSON lines for `tokenize`: training data for its pruned copy.

    Processes with the same command share the work; stopped work resumes when the same command is called again.
    """
    from data_prep.sample import FACTS, SampleConfig
    from data_prep.sample import sample as write
    from llmprune.utils.files import read_json

    config = SampleConfig(
        tokens,
        length,
        first_token,
        temperature,
        temperature_start,
        fall,
        batch_size,
        seed,
        dtype,
        device,
    )
    write(model, out, config, overwrite=overwrite)
    counts = read_json(out / FACTS)["counts"]
    print(f"{out}: {counts['texts']:,} texts, {counts['tokens']:,} tokens; {counts['repeating']:,} repeated themselves")


@app.command()
def reencode(
    data: Annotated[str, typer.Argument(help="A folder that `tokenize` made, or the URL of one.")],
    tokenizer: Tokenizer,
    out: Out,
    processes: Processes = None,
    overwrite: Overwrite = False,
) -> None:
    """Prepare data again for another tokenizer, such as that of a model with fewer tokens."""
    from data_prep import reencode as job

    _print_summary(job.reencode(data, tokenizer, out, processes=processes, overwrite=overwrite, progress=True))


@app.command()
def describe(
    data: Annotated[str, typer.Argument(help="A folder that `tokenize` made, or the URL of one.")],
    samples: Annotated[int, typer.Option(min=0, help="Samples of each domain and split to show as text.")] = 1,
    domain: Annotated[str | None, typer.Option(help="Show samples of this domain alone.")] = None,
    seed: Annotated[int, typer.Option(help="Of their choice.")] = 17,
) -> None:
    """Print the contents of prepared data, and some of their samples as text."""
    from data_prep.describe import show_samples, table
    from llmprune.data.prepared import PreparedData

    prepared = PreparedData(data)
    manifest = prepared.manifest
    shown = show_samples(prepared, samples, domain=domain, seed=seed)
    special = " and ".join(name for name, used in (("BOS", manifest.bos), ("EOS", manifest.eos)) if used)
    print(f"{data}: samples of {manifest.sequence_length} tokens, vocabulary {manifest.vocab_size:,}")
    if manifest.conversations:
        print("conversations; text in ⟦ ⟧ is not learned")
    else:
        print(f"every document has {special or 'neither BOS nor EOS'}")
    print("\n".join(table(manifest)))
    for sample in shown:
        print(f"\n--- {sample.domain}, {sample.split}, sample {sample.number}\n{sample.text}")


def main() -> None:
    """Run the command, alone or as a rank that Composer's launcher started; see ``run_program``.

    The workers of a command that is stopped end, and unfinished output is removed.
    """
    end_with_launcher()
    sys.exit(run_program(_run, "the same command continues or begins anew"))


def _run() -> int:
    end_on_signals()
    check_surroundings(sys.argv)
    try:
        app()
    except OSError as error:
        told = one_line(error) or f"{error.filename or 'the output'}: {error.strerror or error}"
        raise UserError(told) from None
    return 0


def _prepare(
    inputs: list[str],
    tokenizer: str,
    out: Path,
    settings: "PackSettings",
    fields: Fields,
    eval_inputs: list[str] | None,
    shard: str | None,
    processes: int | None,
    overwrite: bool,
) -> None:
    from data_prep.pack import prepare

    if fields.domain is not None and fields.domain_field is not None:
        raise UserError("give --domain or --domain-field, not both")
    summary = prepare(
        inputs,
        tokenizer,
        out,
        settings,
        fields=fields,
        eval_inputs=eval_inputs or [],
        shard=None if shard is None else _numbers(shard),
        processes=processes,
        overwrite=overwrite,
        progress=True,
    )
    _print_summary(summary)
    if shard is not None:
        print(f"{out}: part {shard}, for `python -m data_prep merge`")


def _shares(sets: list[str]) -> dict[str, float]:
    found = {}
    for one in sets:
        name, _, share = one.partition("=")
        if name in found:
            raise UserError(f"--set gives '{name}' twice")
        try:
            found[name] = float(share)
        except ValueError:
            raise UserError(f"--set '{one}' is not of the form NAME=SHARE") from None
    return found


def _numbers(shard: str) -> tuple[int, int]:
    try:
        number, count = map(int, shard.split("/"))
    except ValueError:
        raise UserError(f"--shard '{shard}' is not of the form i/n") from None
    return number, count


def _print_summary(summary: "Summary") -> None:
    from data_prep.describe import lacking, table

    for name, manifest in summary.manifests.items():
        if name:
            print(f"{name}:")
        print("\n".join(table(manifest)))
        for line in lacking(manifest):
            print(line)
    _print_skipped(summary.bad)


def _print_skipped(bad: list[BadRecord]) -> None:
    for record in bad[:10]:
        print(f"skipped {record.place}: {record.reason}", file=sys.stderr)
    if len(bad) > 10:
        print(f"… {len(bad)} records skipped in all", file=sys.stderr)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
