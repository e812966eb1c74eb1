"""The commands that evaluate the quality of models."""

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llmprune.cli.common import Json, app, command_line
from llmprune.cli.options_from_settings import options_from_settings
from llmprune.evaluation.settings import EvaluationConfig, GenerationConfig
from llmprune.utils import formats
from llmprune.utils.errors import UserError

if TYPE_CHECKING:
    from llmprune.models.placement import Placement

Models = Annotated[list[str], typer.Argument(metavar="MODEL…", help="Hugging Face folders or hub names.")]
DTypeToRun = Annotated[
    formats.InferenceFormat, typer.Option(help="Of the weights; auto = bfloat16 where it is fast, else float32.")
]
Device = Annotated[formats.Device | None, typer.Option(help="Default: what is there.")]
DeviceMap = Annotated[
    Literal["auto", "balanced", "sequential"] | None,
    typer.Option(help="Spread the model over all devices and the machine's memory."),
]
Attention = Annotated[formats.Attention | None, typer.Option(help="Default: sdpa where the architecture has it.")]
Adapter = Annotated[str | None, typer.Option(help="Folder of a PEFT adapter to put on the model.")]
Share = Annotated[
    float | None, typer.Option(help="Take this share of each text as its prompt, the rest as its reference.")
]


@app.command()
@options_from_settings(
    {"perplexity.tokens": "perplexity_tokens", "tasks.names": "tasks"}, leave_out=("texts", "generation.batch_size")
)
def evaluate(
    models: Annotated[list[str] | None, typer.Argument(metavar="MODEL…", help="Folders or hub names.")] = None,
    out: Annotated[str | None, typer.Option(help="File to write (.json); logs of samples go beside it.")] = None,
    perplexity: Annotated[list[str] | None, typer.Option(help="Text or prepared data; may be repeated.")] = None,
    *,
    config: EvaluationConfig,
    generated: Annotated[list[str] | None, typer.Option(help="Score what `llmprune generate` wrote.")] = None,
    adapter: Adapter = None,
    dtype: DTypeToRun = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    attention: Attention = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity, tasks and continuations of one or several models."""
    from dataclasses import replace

    from llmprune.models.placement import Placement

    config = replace(config, texts=perplexity or ())
    placement = Placement(dtype, device, device_map, attention, adapter)
    _evaluate(models or [], generated or [], config, placement, out, overwrite=overwrite, as_json=as_json)


def _evaluate(
    models: list[str],
    generated: list[str],
    config: EvaluationConfig,
    placement: "Placement",
    out: str | None,
    *,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Evaluate models, score existing continuations, print the results, and write them to ``out``."""
    from pathlib import Path

    from llmprune.evaluation.continuations import continuation_scores, read_continuations
    from llmprune.evaluation.evaluate import evaluate as evaluate_models
    from llmprune.evaluation.evaluate import results_table
    from llmprune.utils.files import to_json, write_json
    from llmprune.utils.outputs import check_output

    if out is not None:
        check_output(out, ".json", overwrite)
    results: dict[str, Any] = {"schema": 1, "models": {}}
    written = {
        path: {"continuations": {Path(path).stem: continuation_scores(read_continuations(path))}} for path in generated
    }

    def save(results: dict[str, Any]) -> None:
        if written:
            results["generated"] = written
        if out is not None:
            write_json(out, {**results, "command": command_line()})

    if models:
        samples = None if out is None else Path(out).with_suffix(".samples")
        results = evaluate_models(models, config, placement, samples, overwrite=overwrite, keep=save)
    elif not written:
        raise UserError("name a model to evaluate, or continuations to score with --generated")
    else:
        save(results)
    print(to_json(results) if as_json else results_table(results))


@app.command()
@options_from_settings()
def generate(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub name.")],
    prompts: Annotated[str, typer.Option(help="Text, a prompt a line, or JSON lines with prompt and reference.")],
    out: Annotated[str, typer.Option(help="JSON lines to write: prompt, output, reference.")],
    config: GenerationConfig,
    prompt_share: Share = None,
    adapter: Adapter = None,
    dtype: DTypeToRun = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    attention: Attention = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Generate continuations of prompts with a model."""
    from llmprune.evaluation.continuations import read_prompts, save_continuations, write_continuations
    from llmprune.models.loaded import open_model
    from llmprune.models.placement import Placement
    from llmprune.utils.outputs import check_output

    check_output(out, ".jsonl", overwrite)
    config.check()
    read = read_prompts(prompts, prompt_share)
    records = write_continuations(
        open_model(model, Placement(dtype, device, device_map, attention, adapter)), read, config
    )
    save_continuations(records, out)
    print(f"{out}: {len(records)} continuations")


@app.command()
def references(
    models: Annotated[list[str], typer.Argument(metavar="MODEL…", help="The source, or several of its family.")],
    data: Annotated[str, typer.Option(help="Prepared data: a folder that `python -m data_prep` made, or a URL.")],
    out: Annotated[str, typer.Option(help="File to write (.json).")],
    size: Annotated[
        float | None, typer.Option(help="Parameters that several models' scaling law is asked for.")
    ] = None,
    samples_per_domain: Annotated[int | None, typer.Option(min=1, help="Of each domain at most.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 8,
    document_boundaries: Annotated[
        bool | None, typer.Option(help="Attention restarts at each document; default: for conversations.")
    ] = None,
    dtype: DTypeToRun = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    attention: Attention = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Measure the loss that each domain is expected to reach, for dynamic_loading.references."""
    from llmprune.data.prepared import PreparedData
    from llmprune.evaluation.references import references as measure_references
    from llmprune.models.placement import Placement
    from llmprune.utils.files import write_json
    from llmprune.utils.outputs import check_output

    check_output(out, ".json", overwrite)
    found = measure_references(
        models,
        PreparedData(data),
        Placement(dtype, device, device_map, attention),
        size=size,
        samples_per_domain=samples_per_domain,
        batch_size=batch_size,
        boundaries=document_boundaries,
    )
    write_json(out, found)
    for domain, loss in found["references"].items():
        law = found.get("laws", {}).get(domain)
        quality = "" if law is None else f"   {law['a']:.4g}·N^-{law['b']:.4f} + {law['c']:.4f}, "
        if law is not None:
            quality += "exact, so of unknown quality" if law["rmse"] is None else f"rmse {law['rmse']:.4f}"
        print(f"{domain:30}{loss:8.4f}{quality}")


@app.command()
def stability(
    before: Annotated[str, typer.Argument(help="The original's answers: lm-eval sample logs, or OpenCompass's.")],
    after: Annotated[str, typer.Argument(help="The smaller model's answers to the same questions.")],
    tokenizer: Annotated[str | None, typer.Option(help="The original, for logs of lm-eval's own command.")] = None,
    as_json: Json = False,
) -> None:
    """Compare a smaller model's answers with the original's: their agreement, in percent."""
    from dataclasses import asdict

    from llmprune.evaluation.stability import read_answers
    from llmprune.evaluation.stability import stability as compare
    from llmprune.models.loading import load_tokenizer

    counting = None if tokenizer is None else load_tokenizer(tokenizer)
    found = compare(read_answers(before, counting), read_answers(after, counting))
    if as_json:
        print(json.dumps(asdict(found)))
        return
    for subject, value in found.subjects.items():
        print(f"{subject:40}{value:8.2f}")
    print(f"{'overall':40}{found.overall:8.2f}")
