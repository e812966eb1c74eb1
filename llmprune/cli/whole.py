"""The command that does the whole way from a model to a smaller one."""

import json
from typing import Annotated

import typer

from llmprune.cli.common import Json, Out, app
from llmprune.cli.options_from_settings import options_from_settings
from llmprune.jobs.prune.settings import PruneConfig


@app.command()
@options_from_settings(leave_out=("budget.dtype",))
def prune(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder or hub name.")],
    out: Out,
    settings: PruneConfig,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the steps with sizes and times; do none.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew if OUT was begun with other settings.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a model smaller and recover, evaluate, measure and report it; called again, a stopped command goes on."""
    from composer.utils import dist

    from llmprune.jobs.prune.forecast import forecast
    from llmprune.jobs.prune.job import prune as prune_model

    if dry_run:
        found = forecast(model, settings)
        print(json.dumps(found.facts()) if as_json else found)
        return
    outcome = prune_model(model, out, settings, overwrite=overwrite)
    if dist.get_global_rank() == 0:
        print(json.dumps(outcome.facts()) if as_json else outcome)
