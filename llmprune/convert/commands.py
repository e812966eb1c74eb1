"""The ways to a Hugging Face folder: from a checkpoint, and from a model and a plan."""

import json
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from llmprune.convert.checkpoint import Checkpoint
from llmprune.convert.export import export, keep_everything
from llmprune.errors import UserError
from llmprune.files import refuse_existing
from llmprune.models.loading import StoredWeights, fingerprint, load_config, resolve_model
from llmprune.plans import Plan
from llmprune.run_folder import RunFolder


def convert(
    checkpoint: Path | str, out: Path | str, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Plan:
    """Turn a Composer checkpoint into a Hugging Face folder; gates are carried out on the way.

    Args:
        checkpoint: its file, or its run's folder.
        out: folder to write.
        dtype: of the weights written; None = as trained.
        overwrite: whether ``out`` may be replaced.

    Returns:
        The plan that was carried out.

    Raises:
        UserError: there is no checkpoint, it is damaged, or ``out`` exists.
    """
    refuse_existing(Path(out), overwrite)
    opened = Checkpoint.open(checkpoint)
    gates, model = opened.gates(), opened.fingerprint()
    plan = keep_everything(opened.config, model) if gates is None else gates.plan(opened.family.name, model)
    manifest = opened.manifest
    card = {
        "Data": f"Trained on `{manifest.data['path']}`.",
        "Training": {"seed": manifest.seed, "versions": manifest.versions, "l0_pruning": manifest.l0_pruning},
    }
    if results := last_evaluation(RunFolder(opened.path.parent.parent).metrics):
        card["Results of the last evaluation in training"] = results
    export(
        opened.weights,
        opened.config,
        plan,
        out,
        companions=opened.model_folder,
        source=manifest.source,
        card=card,
        dtype=dtype,
        overwrite=overwrite,
    )
    return plan


def apply(model: Path | str, plan: Plan | Path | str, out: Path | str, *, overwrite: bool = False) -> None:
    """Cut a Hugging Face model by a plan.

    Args:
        model: folder or hub name.
        plan: the plan, or its file.
        out: folder to write.
        overwrite: whether ``out`` may be replaced.

    Raises:
        UserError: the plan is for other weights, a file is missing or damaged, or ``out`` exists.
    """
    refuse_existing(Path(out), overwrite)
    if not isinstance(plan, Plan):
        plan = Plan.load(plan)
    config, weights = load_config(model), StoredWeights(model)
    if plan.model != (found := fingerprint(weights, config)):
        raise UserError(
            f"the plan was made for a model with the hash {plan.model[:12]}…; {model} has {found[:12]}…: "
            "apply it to the model that it was made for"
        )
    export(weights, config, plan, out, companions=resolve_model(model), source=str(model), overwrite=overwrite)


def push_to_hub(folder: Path | str, name: str) -> str:
    """Upload a Hugging Face folder; returns its address.

    Raises:
        UserError: the hub refuses or can't be reached.
    """
    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder} could not be uploaded as '{name}' ({reason}): it stays where it is") from None


def last_evaluation(metrics: Path) -> dict[str, float]:
    """The newest evaluation in a ``metrics.jsonl``: metric → value (empty if there is none)."""
    if not metrics.is_file():
        return {}
    prefix = "metrics/eval/"
    found: dict[str, float] = {}
    for line in metrics.read_text().splitlines():
        values = {k.removeprefix(prefix): v for k, v in json.loads(line).items() if k.startswith(prefix)}
        found = {**values, "batch": json.loads(line)["batch"]} if values else found
    return found
