"""The command that downloads the files that clusters without a network need."""

import os
from pathlib import Path
from typing import Annotated

import typer

from llmprune.cli.common import app
from llmprune.utils.errors import UserError


@app.command()
def download(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME…]",
            help="Models of the hub, tasks and suites, data sets (dataset:NAME), prepared data at a URL.",
        ),
    ] = None,
    for_yaml: Annotated[str | None, typer.Option("--for", help="Everything that this job's YAML names.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of the YAML; may be repeated.")
    ] = None,
    out: Annotated[str, typer.Option(help="Folder, laid out as HF_HOME; may hold something already.")] = "downloads",
) -> None:
    """Download models, data sets and tasks on a machine that has a network. A second call resumes a download."""
    if not names and for_yaml is None:
        raise UserError("name something, or a job with --for YAML")
    folder = Path(out).resolve()
    os.environ["HF_HOME"] = str(folder)  # before the hub's library is imported
    for variable in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HUGGINGFACE_HUB_CACHE"):
        os.environ.pop(variable, None)
    from llmprune.config.job_files import load_job
    from llmprune.jobs.offline import KINDS, fetch, need_named, needs_of

    needs = [] if for_yaml is None else [*needs_of(load_job(for_yaml, set_ or ()))]
    if names:
        from llmprune.evaluation.tasks import task_manager

        plain = any(":" not in name or name.partition(":")[0] not in KINDS for name in names)
        known = task_manager(None).all_tasks if plain else ()
        needs += [need_named(name, known) for name in names]
    for need in dict.fromkeys(needs):
        print(f"{need}: {fetch(need, folder)}", flush=True)
    if not needs:
        print(f"{for_yaml} names nothing that has to be fetched")
    print(f"where there is no network: export HF_HOME={folder}, and run.offline=true in jobs")
