"""Writing Hugging Face folders: from a checkpoint, or from a model and a plan."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from llmprune.checkpoints.metrics import read_metrics
from llmprune.checkpoints.run_folder import RunFolder
from llmprune.conversion.checkpoint import Checkpoint, CheckpointWeights, is_checkpoint
from llmprune.conversion.export import export, keep_everything
from llmprune.conversion.result import Result
from llmprune.models.families import RicherHeadsConfig
from llmprune.models.loading import load_model_config
from llmprune.models.source import find_folder
from llmprune.models.stored_weights import StoredWeights, fingerprint
from llmprune.plans.plan import Plan
from llmprune.plans.recorded import earlier_cut
from llmprune.recovery.lora import LoRAConfig, adapter_tensors
from llmprune.utils.checksums import record
from llmprune.utils.errors import UserError
from llmprune.utils.files import save_tensors
from llmprune.utils.outputs import output_folder, refuse_existing, refuse_replacing

log = logging.getLogger(__name__)


def convert(
    checkpoint: Path | str, out: Path | str, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Plan:
    """Turn a Composer checkpoint into a Hugging Face folder; the model is cut to the shape that gates decide.

    Args:
        checkpoint: checkpoint file, or run folder.
        out: folder to write.
        dtype: dtype of the written weights; None = as trained.
        overwrite: whether ``out`` may be replaced.

    Returns:
        The plan that was applied.

    Raises:
        UserError: there is no checkpoint, it is damaged, or ``out`` exists.
    """
    found = Checkpoint.open(checkpoint)
    refuse_replacing(out, [found.path])
    refuse_existing(Path(out), overwrite)
    manifest = found.manifest
    whole = keep_everything(found.config, found.fingerprint())
    result = Result(found.weights, whole, newest=found.path != Path(checkpoint).resolve())
    for section, settings in found.sections:
        result = section.convert(settings, found, result)
    card = {
        "Data": f"Trained on `{manifest.data['path']}`.",
        "Training": {"seed": manifest.seed, "versions": manifest.versions, **manifest.sections},
    }
    if results := last_evaluation(RunFolder(found.path.parent.parent).metrics, found.batch):
        card["Results of the last evaluation in training"] = results
    export(
        result.weights,
        found.config,
        result.plan,
        out,
        companions=found.model_folder,
        source=manifest.source,
        earlier=earlier_cut(Path(manifest.source), whole) if result.plan is whole else None,
        network=result.network,
        card=card,
        dtype=dtype,
        overwrite=overwrite,
    )
    return result.plan


def apply(model: Path | str, plan: Plan | Path | str, out: Path | str, *, overwrite: bool = False) -> None:
    """Cut a model by a plan.

    Args:
        model: Hugging Face folder or hub name, or a checkpoint (its gates are not used: the plan decides).
        plan: plan, or the path of its file.
        out: folder to write.
        overwrite: whether ``out`` may be replaced.

    Raises:
        UserError: the plan is for other weights, a file is missing or damaged, or ``out`` exists.
    """
    weights: Mapping[str, Tensor]
    if is_checkpoint(model):
        checkpoint = Checkpoint.open(model)
        config, weights, folder, place = checkpoint.config, checkpoint.weights, checkpoint.model_folder, checkpoint.path
    else:
        source = find_folder(model)
        config, weights, folder, place = load_model_config(source), StoredWeights(source), source.path, source.path
    refuse_replacing(out, [place] if isinstance(plan, Plan) else [place, plan])
    refuse_existing(Path(out), overwrite)
    if not isinstance(plan, Plan):
        plan = Plan.load(plan)
    plan.check_applicable()
    if plan.model != (found := fingerprint(weights, config)):
        raise UserError(
            f"the plan was made for a model with the hash {plan.model}; {model} has {found}: apply it to the model "
            "that it was made for"
        )
    export(weights, config, plan, out, companions=folder, source=str(model), overwrite=overwrite)


def enrich(model: Path | str, heads: RicherHeadsConfig, out: Path | str, *, overwrite: bool = False) -> None:
    """Give every attention of a model richer heads that begin as the identity: the model's output does not change.

    Args:
        model: Hugging Face folder or hub name.
        heads: settings of the richer heads; they must be residual.
        out: folder to write.
        overwrite: whether ``out`` may be replaced.

    Raises:
        UserError: the model has richer heads already, they would not begin as the identity, or ``out`` exists.
    """
    config = load_model_config(model)
    whole = keep_everything(config, fingerprint(StoredWeights(model), config))
    apply(model, dataclasses.replace(whole, richer_heads=heads), out, overwrite=overwrite)


def export_adapter(checkpoint: Path | str, out: Path | str, *, overwrite: bool = False) -> None:
    """Write only the adapters of a checkpoint, as a folder that PEFT loads.

    Args:
        checkpoint: checkpoint file, or run folder.
        out: folder to write.
        overwrite: whether ``out`` may be replaced.

    Raises:
        UserError: the checkpoint has no adapters or is damaged, or ``out`` exists.
    """
    found = Checkpoint.open(checkpoint)
    refuse_replacing(out, [found.path])
    refuse_existing(Path(out), overwrite)
    lora = found.manifest.section(LoRAConfig)
    if lora is None:
        raise UserError(f"{found.path} has no adapters: it was not trained with lora")
    settings = lora.peft(found.config, found.manifest.source)
    settings.inference_mode = True
    with output_folder(out, overwrite) as folder:
        settings.save_pretrained(str(folder))
        save_tensors(folder / "adapter_model.safetensors", adapter_tensors(CheckpointWeights(found.state)), {})
        record(folder)


def push_to_hub(folder: Path | str, name: str) -> str:
    """Upload a Hugging Face folder; returns its address.

    Raises:
        UserError: the hub refuses the upload or can't be reached.
    """
    api = HfApi()
    log.info("uploading %s as %s", folder, name)
    try:
        api.create_repo(name, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder} could not be uploaded as '{name}' ({reason}): it stays where it is") from None


def last_evaluation(metrics: Path, batch: int) -> dict[str, float]:
    """The newest evaluation in a ``metrics.jsonl`` up to a batch, as metric → value; empty if there is none."""
    prefix = "metrics/eval/"
    found: dict[str, float] = {}
    for line in read_metrics(metrics):
        values = {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
        if values and line["batch"] <= batch:
            found = {**values, "batch": line["batch"]}
    return found
