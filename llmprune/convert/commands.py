"""The ways to a Hugging Face folder: from a checkpoint, and from a model and a plan."""

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
from llmprune.convert.checkpoint import Checkpoint, CheckpointWeights, is_checkpoint
from llmprune.convert.export import export, keep_everything
from llmprune.convert.replaced import Replaced, read_replaced
from llmprune.models.families import RicherHeadsConfig
from llmprune.models.loading import load_config
from llmprune.models.source import resolve_model
from llmprune.models.stored_weights import StoredWeights, fingerprint
from llmprune.plans.plan import Plan
from llmprune.pruning.gates.gate_set import GateSet
from llmprune.recovery.lora import LoRAConfig, adapter_tensors
from llmprune.utils.checksums import record
from llmprune.utils.errors import UserError
from llmprune.utils.files import save_tensors
from llmprune.utils.outputs import output_folder, refuse_existing, refuse_replacing

UNFINISHED = 0.02  # distance from the target sparsity that is worth a warning

log = logging.getLogger(__name__)


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
    opened = Checkpoint.open(checkpoint)
    refuse_replacing(out, [opened.path])
    refuse_existing(Path(out), overwrite)
    manifest, gates = opened.manifest, opened.gates()
    weights: Mapping[str, Tensor] = opened.weights
    replaced = None
    if manifest.block_replacement is not None:
        replaced = read_replaced(opened, best=opened.path != Path(checkpoint).resolve())
        weights = replaced.weights
        _say_which(replaced)
    plan = keep_everything(opened.config, opened.fingerprint())
    if gates is not None:
        _warn_of_unfinished(gates)
        plan = gates.plan(opened.family.name, plan.model)
    if replaced is not None:
        plan = dataclasses.replace(plan, blocks=replaced.kept(plan.source.layers), stand_in=replaced.described)
    card = {
        "Data": f"Trained on `{manifest.data['path']}`.",
        "Training": {
            "seed": manifest.seed,
            "versions": manifest.versions,
            "l0_pruning": manifest.l0_pruning,
            "block_replacement": manifest.block_replacement,
            "trainable": manifest.trainable,
            "lora": manifest.lora,
            "distillation": manifest.distillation,
        },
    }
    if results := last_evaluation(RunFolder(opened.path.parent.parent).metrics, opened.batch):
        card["Results of the last evaluation in training"] = results
    export(
        weights,
        opened.config,
        plan,
        out,
        companions=opened.model_folder,
        source=manifest.source,
        network=None if replaced is None else replaced.network,
        card=card,
        dtype=dtype,
        overwrite=overwrite,
    )
    return plan


def apply(model: Path | str, plan: Plan | Path | str, out: Path | str, *, overwrite: bool = False) -> None:
    """Cut a model by a plan.

    Args:
        model: Hugging Face folder or hub name, or a checkpoint (its gates are not used: the plan decides).
        plan: the plan, or its file.
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
        config, weights, folder = load_config(model), StoredWeights(model), resolve_model(model)
        place = folder
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
    """Give every attention of a model richer heads that begin as the identity: it computes what it did before.

    Args:
        model: Hugging Face folder or hub name.
        heads: how they are richer; residual.
        out: folder to write.
        overwrite: whether ``out`` may be replaced.

    Raises:
        UserError: the heads are richer already or would not begin as the identity, or ``out`` exists.
    """
    config = load_config(model)
    whole = keep_everything(config, fingerprint(StoredWeights(model), config))
    apply(model, dataclasses.replace(whole, richer_heads=heads), out, overwrite=overwrite)


def export_adapter(checkpoint: Path | str, out: Path | str, *, overwrite: bool = False) -> None:
    """Write the adapters of a checkpoint alone, as a folder that PEFT loads.

    Args:
        checkpoint: its file, or its run's folder.
        out: folder to write.
        overwrite: whether ``out`` may be replaced.

    Raises:
        UserError: it has none, is damaged, or ``out`` exists.
    """
    opened = Checkpoint.open(checkpoint)
    refuse_replacing(out, [opened.path])
    refuse_existing(Path(out), overwrite)
    if opened.manifest.lora is None:
        raise UserError(f"{opened.path} has no adapters: it was not trained with lora")
    settings = LoRAConfig(**opened.manifest.lora).peft(opened.config, opened.manifest.source)
    settings.inference_mode = True
    with output_folder(out, overwrite) as folder:
        settings.save_pretrained(str(folder))
        save_tensors(folder / "adapter_model.safetensors", adapter_tensors(CheckpointWeights(opened.state)), {})
        record(folder)


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


def last_evaluation(metrics: Path, batch: int) -> dict[str, float]:
    """The newest evaluation in a ``metrics.jsonl`` up to a batch: metric → value (empty if there is none)."""
    prefix = "metrics/eval/"
    found: dict[str, float] = {}
    for line in read_metrics(metrics):
        values = {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
        if values and line["batch"] <= batch:
            found = {**values, "batch": line["batch"]}
    return found


def _say_which(replaced: Replaced) -> None:
    """Name the stand-in that is exported, and what the model needs."""
    if replaced.best is not None:
        log.warning(
            "the stand-in of batch %d is exported, whose held-out loss is the lowest: %.4f", *replaced.best[::-1]
        )
    if replaced.network is not None:
        log.warning(
            "no config of this family can describe the stand-in '%s': the model loads with trust_remote_code=True, or "
            "with llmprune's own commands",
            replaced.settings.kind,
        )


def _warn_of_unfinished(gates: GateSet) -> None:
    """Say so if the gates are not yet near their target: the cut model is then another one than the gated."""
    far = {
        name: (rows.mean().item(), gates.goal.targets[name])
        for name, rows in gates.sparsity().items()
        if (rows - gates.goal.targets[name]).abs().max() > UNFINISHED
    }
    if far:
        listed = ", ".join(f"{name} {now:.3f} of {target:.3f}" for name, (now, target) in far.items())
        log.warning(
            "the gates have not come to their target yet (expected sparsity: %s): the cut model is worse than they "
            "could make it; train longer",
            listed,
        )
