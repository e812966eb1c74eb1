"""The commands that show results: the report and the demo."""

from typing import Annotated

import typer

from llmprune.cli.common import app
from llmprune.cli.evaluating import Adapter, Attention, Device, DeviceMap, DTypeToRun, Models


@app.command()
def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN…", help="Runs, models, plans, scores, results, speeds, continuations, or folders of them."
        ),
    ],
    out: Annotated[str, typer.Option(help="Page to write (.html).")],
    plots: Annotated[str | None, typer.Option(help="Folder for every figure as PNG and CSV.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT and PLOTS if they exist.")] = False,
) -> None:
    """Write one self-contained page: what pruning gained and cost, texts, plans, curves, scores."""
    from llmprune.reporting.page import write_report
    from llmprune.utils.outputs import check_output

    check_output(out, ".html", overwrite)
    print(write_report(runs, out, plots=plots, overwrite=overwrite))


@app.command()
def demo(
    models: Models,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 = every one of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 = any that is free.")] = 7860,
    adapter: Adapter = None,
    dtype: DTypeToRun = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    attention: Attention = None,
) -> None:
    """Serve a web page on which models answer the same prompt side by side, as a chat if all have a chat template."""
    from llmprune.models.placement import Placement
    from llmprune.reporting.demo import serve

    serve(models, Placement(dtype, device, device_map, attention, adapter), host=host, port=port)
