"""The commands that evaluate the quality of models."""

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llmprune.cli.common import Json, app, command_line, names_in
from llmprune.utils import formats
from llmprune.utils.errors import UserError

if TYPE_CHECKING:
    from llmprune.evaluation.evaluate import EvaluationConfig
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
MaxNewTokens = Annotated[int, typer.Option(help="Continuations: tokens at most.")]
Temperature = Annotated[float, typer.Option(help="Continuations: 0 = always the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Continuations: sample from the likeliest that make up so much.")]
TopK = Annotated[int, typer.Option(help="Continuations: sample from so many of the likeliest; 0 = all.")]
PerPrompt = Annotated[int, typer.Option(help="Continuations of each prompt.")]
Seed = Annotated[int, typer.Option(help="Of the sampling.")]
Share = Annotated[
    float | None, typer.Option(help="Take this share of each text as its prompt, the rest as its reference.")
]


@app.command()
def evaluate(
    models: Annotated[list[str] | None, typer.Argument(metavar="MODEL…", help="Folders or hub names.")] = None,
    out: Annotated[str | None, typer.Option(help="File to write (.json); logs of samples go beside it.")] = None,
    perplexity: Annotated[list[str] | None, typer.Option(help="Text or prepared data; may be repeated.")] = None,
    segment: Annotated[int, typer.Option(help="Perplexity: tokens of a segment.")] = 128,
    stride: Annotated[int | None, typer.Option(help="Perplexity: tokens between segments; default: segment.")] = None,
    bos: Annotated[
        str, typer.Option(help="Perplexity: where a BOS is put: none, once, each, or several.")
    ] = "once,each",
    samples_per_domain: Annotated[int | None, typer.Option(help="Perplexity: of prepared data at most.")] = None,
    text_field: Annotated[str, typer.Option(help="Field of a JSON record that holds the text.")] = "text",
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval or suites, separated by commas.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Tasks: examples in the prompt.")] = None,
    limit: Annotated[float | None, typer.Option(help="Tasks: questions of each, or a share below 1.")] = None,
    include_path: Annotated[
        str | None, typer.Option(help="Tasks: folder with task files of your own; Python code that they name is run.")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="Continuations: prompts with references.")] = None,
    prompt_share: Share = None,
    generated: Annotated[list[str] | None, typer.Option(help="Score what `llmprune generate` wrote.")] = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    per_prompt: PerPrompt = 1,
    seed: Seed = 17,
    batch_size: Annotated[str, typer.Option(help="Samples per forward pass, or auto.")] = "8",
    adapter: Adapter = None,
    dtype: DTypeToRun = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    attention: Attention = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity, tasks and continuations of one or several models."""
    from llmprune.evaluation.continuations import GenerationConfig
    from llmprune.evaluation.evaluate import EvaluationConfig
    from llmprune.evaluation.perplexity import PerplexityConfig
    from llmprune.evaluation.tasks import TasksConfig
    from llmprune.models.placement import Placement

    config = EvaluationConfig(
        perplexity or (),
        PerplexityConfig(segment, stride, names_in(bos) or (), text_field, samples_per_domain),
        TasksConfig(names_in(tasks) or (), num_fewshot, limit, include_path),
        prompts,
        prompt_share,
        GenerationConfig(max_new_tokens, temperature, top_p, top_k, per_prompt, seed),
        _batch_size(batch_size),
    )
    placement = Placement(dtype, device, device_map, attention, adapter)
    _evaluate(models or [], generated or [], config, placement, out, overwrite=overwrite, as_json=as_json)


def _evaluate(
    models: list[str],
    generated: list[str],
    config: "EvaluationConfig",
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


def _batch_size(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub name.")],
    prompts: Annotated[str, typer.Option(help="Text, a prompt a line, or JSON lines with prompt and reference.")],
    out: Annotated[str, typer.Option(help="JSON lines to write: prompt, output, reference.")],
    prompt_share: Share = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    per_prompt: PerPrompt = 1,
    seed: Seed = 17,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    adapter: Adapter = None,
    dtype: DTypeToRun = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    attention: Attention = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Generate continuations of prompts with a model."""
    from llmprune.evaluation.continuations import (
        GenerationConfig,
        read_prompts,
        save_continuations,
        write_continuations,
    )
    from llmprune.models.loaded import open_model
    from llmprune.models.placement import Placement
    from llmprune.utils.outputs import check_output

    check_output(out, ".jsonl", overwrite)
    config = GenerationConfig(max_new_tokens, temperature, top_p, top_k, per_prompt, seed, batch_size)
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
