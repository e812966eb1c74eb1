"""The commands that measure speed and size of models, estimate jobs, and quantise models."""

import json
from typing import Annotated, Literal

import typer

from llmprune.cli.common import Json, Out, Overwrite, app, command_line, numbers_in
from llmprune.cli.evaluating import Adapter, Attention, Device, DeviceMap, DTypeToRun, Models
from llmprune.utils.formats import Format


@app.command()
def measure(
    models: Models,
    out: Annotated[str | None, typer.Option(help="File to write (.json); CSV files go beside it.")] = None,
    batch_sizes: Annotated[str, typer.Option(help="Sequences at a time, separated by commas.")] = "1",
    prompt_tokens: Annotated[str, typer.Option(help="Lengths of the prompt.")] = "16",
    output_tokens: Annotated[str, typer.Option(help="Lengths of the output; empty = prefill only.")] = "128",
    warmups: Annotated[int, typer.Option(help="Runs before those that count.")] = 10,
    repeats: Annotated[int, typer.Option(help="Runs that count.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 17,
    uncached: Annotated[
        bool, typer.Option("--uncached", help="Time generation without a key/value cache, too.")
    ] = False,
    adapter: Adapter = None,
    dtype: DTypeToRun = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    attention: Attention = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    as_json: Json = False,
) -> None:
    """Measure latency, throughput, memory and operations; several models run in turns."""
    from pathlib import Path

    from llmprune.measurement.measure import MeasureConfig
    from llmprune.measurement.measure import measure as measure_models
    from llmprune.measurement.results import files_beside, save, speed_table
    from llmprune.models.placement import Placement
    from llmprune.utils.outputs import check_output

    if out is not None:
        check_output(out, ".json", overwrite, files_beside(Path(out)))
    config = MeasureConfig(
        numbers_in(batch_sizes, "--batch-sizes"),
        numbers_in(prompt_tokens, "--prompt-tokens"),
        numbers_in(output_tokens, "--output-tokens"),
        warmups,
        repeats,
        seed,
        uncached,
    )
    results, watch = measure_models(models, config, Placement(dtype, device, device_map, attention, adapter))
    if out is not None:
        save({**results, "command": command_line()}, watch, Path(out))
    print(json.dumps(results) if as_json else speed_table(results))


@app.command()
def estimate(
    yaml: Annotated[str, typer.Argument(metavar="YAML", help="A job that trains.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE…]", help="Changes of the YAML.")] = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs in all.")] = 1,
    gpu_memory: Annotated[str, typer.Option(help="Memory of each GPU.")] = "80GB",
    gpus_per_node: Annotated[int, typer.Option(help="Number of GPUs of a node.")] = 8,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of a sample; default: the data's.")] = None,
    tflops: Annotated[
        float | None,
        typer.Option(help="Speed of a GPU at its best; default: an H100's, 989 with train.precision=amp_*, else 67."),
    ] = None,
    utilisation: Annotated[float, typer.Option(help="Share of this speed that training reaches.")] = 0.4,
    bandwidth: Annotated[str, typer.Option(help="Bytes per second between a GPU and other nodes.")] = "50GB",
    bandwidth_within: Annotated[str, typer.Option(help="The same within a node.")] = "400GB",
    price: Annotated[float | None, typer.Option(help="Price of a GPU for an hour.")] = None,
    as_json: Json = False,
) -> None:
    """Estimate a job's memory per rank, time and cost. Nothing is loaded. Exit code 1: the job does not fit."""
    from llmprune.config.job_files import load_training_job
    from llmprune.estimate.job import HELP_WITH_MEMORY, Cluster, estimate_job
    from llmprune.pruning.budgets.limits import bytes_of

    config = load_training_job(yaml, overrides or ())
    if tflops is None:
        tflops = 67.0 if config.train.precision == "fp32" else 989.0
    cluster = Cluster(
        gpus,
        bytes_of(gpu_memory, "--gpu-memory"),
        gpus_per_node,
        tflops * 1e12,
        utilisation,
        bytes_of(bandwidth, "--bandwidth"),
        bytes_of(bandwidth_within, "--bandwidth-within"),
        price,
    )
    found = estimate_job(config, cluster, sequence_length)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        print(f"assumed: {gpus} × a GPU of {gpu_memory}, {utilisation:.0%} of {tflops:g} TFLOPS (see --help)\n")
        print(found)
        if not found.fits:
            print(f"\ntake {HELP_WITH_MEMORY}")
    if not found.fits:
        raise typer.Exit(1)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub name.")],
    out: Out,
    data: Annotated[str, typer.Option(help="Calibration text: prepared data, text, Markdown or JSON lines.")],
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    seq_len: Annotated[int, typer.Option(help="Tokens of each.")] = 2048,
    bos: Annotated[Literal["none", "first", "each"], typer.Option(help="Put a BOS before these samples.")] = "none",
    text_field: Annotated[str, typer.Option(help="Field of a JSON record that holds the text.")] = "text",
    group_size: Annotated[int, typer.Option(help="Weights of a row that share a scale.")] = 128,
    activation_order: Annotated[bool, typer.Option(help="Columns with the largest activations first.")] = True,
    dtype: Annotated[
        Format | None,
        typer.Option(help="Of embeddings, output layer, norms and scales; default: as stored, bfloat16 for float32."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Quantise a model's linear layers to four bits by GPTQ."""
    import torch

    from llmprune.conversion.quantize import QuantizeConfig
    from llmprune.conversion.quantize import quantize as quantize_model
    from llmprune.data.calibration_settings import CalibrationConfig

    config = QuantizeConfig(
        CalibrationConfig(data, samples, seq_len, bos, text_field),
        group_size,
        activation_order,
        dtype=None if dtype is None else getattr(torch, dtype),
    )
    size = quantize_model(model, out, config, overwrite=overwrite)
    print(f"{out}: {size / 1e6:,.1f} MB")
