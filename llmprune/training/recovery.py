"""What comes before a run that trains a pruned model back: do its settings fit the model, its teacher and the data?"""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from llmprune.config.schema import Config
from llmprune.data.format import DataManifest, tokenizer_fingerprint
from llmprune.models.families import family_of
from llmprune.models.loading import load_config, load_tokenizer
from llmprune.plans.plan import Plan
from llmprune.recovery.correspondence import Correspondence, corresponding
from llmprune.recovery.lora import LoRAConfig, targets_of
from llmprune.recovery.settings import DistillationConfig
from llmprune.recovery.trainable import phases
from llmprune.utils.errors import UserError


def check_recovery(config: Config, model: PretrainedConfig, data: DataManifest) -> None:
    """Check the sections ``trainable``, ``lora`` and ``distillation``.

    Args:
        config: of the run.
        model: of the model that trains.
        data: that it trains on.

    Raises:
        UserError: something does not fit.
    """
    chosen = [name for name in ("trainable", "lora") if getattr(config, name) is not None]
    others = [name for name in ("l0_pruning", "block_replacement") if getattr(config, name) is not None]
    if len(chosen) > 1:
        raise UserError("trainable and lora both say what trains: leave one out")
    if chosen and others:
        raise UserError(f"{others[0]} decides itself what trains: leave out {chosen[0]}")
    if config.trainable is not None:
        config.trainable.check()
        with torch.device("meta"):
            phases(AutoModelForCausalLM.from_config(model), config.trainable.parts, config.trainable.later)
    if config.lora is not None:
        _check_lora(config, config.lora, model)
    if config.distillation is not None:
        config.distillation.check()
        if config.block_replacement is not None:
            raise UserError(
                "a stand-in learns from the source as it is: leave out distillation and name block_replacement's "
                "objectives kl, mse or cosine"
            )
        _check_teacher(config, config.distillation, model, data)
        correspondence_of(config, model)


def _check_lora(config: Config, lora: LoRAConfig, model: PretrainedConfig) -> None:
    lora.check()
    targets_of(model, lora.targets)
    if config.model.path is None:
        raise UserError("adapters train beside a model's weights: name it with model.path")
    if config.sharding is not None and config.model.dtype != "float32":
        raise UserError(
            "adapters are float32 and shards hold one dtype: take model.dtype=float32 (on GPUs "
            "with train.precision=amp_bf16), or leave out sharding"
        )
    if lora.quantize is None:
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("the package bitsandbytes is not installed: pip install -e .")
    if config.sharding is not None:
        raise UserError(
            "a base of four bits can't be sharded, every rank holds it: leave out sharding or lora.quantize"
        )


def _check_teacher(config: Config, settings: DistillationConfig, model: PretrainedConfig, data: DataManifest) -> None:
    if settings.teacher is None:
        if config.l0_pruning is None:
            _check_kept(config, settings, model, data)
        return
    teacher = load_config(settings.teacher)
    if tokenizer_fingerprint(load_tokenizer(settings.teacher)) != data.tokenizer:
        raise UserError(f"the tokenizer of the teacher {settings.teacher} did not make the data: take another teacher")
    if teacher.vocab_size != model.vocab_size:
        raise UserError(
            f"the teacher's vocabulary has {teacher.vocab_size} tokens, the model's {model.vocab_size}: take a teacher "
            "with the model's"
        )


def _check_kept(config: Config, settings: DistillationConfig, model: PretrainedConfig, data: DataManifest) -> None:
    kept = data.teacher
    if kept is None:
        raise UserError(
            "name distillation.teacher, or data with a teacher's predictions (python -m data_prep teach DATA)"
        )
    if settings.compares_states:
        raise UserError("kept predictions hold no states: leave out the objectives mse and cosine, or name the teacher")
    if kept["vocab_size"] != model.vocab_size:
        raise UserError(
            f"the vocabulary of the kept predictions' teacher has {kept['vocab_size']} tokens, the model's "
            f"{model.vocab_size}: take a teacher with the model's"
        )
    boundaries = data.conversations if config.data.document_boundaries is None else config.data.document_boundaries
    for key, wanted, found in (
        ("distillation.temperature", settings.temperature, kept["temperature"]),
        ("data.document_boundaries", boundaries, kept["boundaries"]),
    ):
        if wanted != found:
            raise UserError(f"the kept predictions were made with {key} {found}, the config asks for {wanted}")
    if settings.top_k is not None and settings.top_k > kept["top_k"]:
        raise UserError(f"distillation.top_k is {settings.top_k}; only {kept['top_k']} were kept")


def correspondence_of(config: Config, model: PretrainedConfig) -> Correspondence | None:
    """How the model's states compare with its teacher's; None if they are not compared.

    Args:
        config: of the run.
        model: of the model that trains.

    Raises:
        UserError: they can't be compared.
    """
    settings = config.distillation
    if settings is None or not settings.compares_states:
        return None
    student = family_of(model).shape(model)
    if settings.teacher is None:
        if config.l0_pruning is not None and "hidden" in (config.l0_pruning.gates or ["hidden"]):
            raise UserError(
                "gates of hidden dimensions leave out what an ungated model's states have: take the objectives kl and "
                "lm, or other gates"
            )
        return corresponding(student, student, None, settings.blocks)
    teacher = load_config(settings.teacher)
    path = None if settings.plan is None else Path(settings.plan)
    if path is None and config.model.path is not None:
        beside = Path(config.model.path) / "llmprune" / "plan.json"
        path = beside if beside.is_file() else None
    plan = None if path is None else Plan.load(path)
    if settings.plan is None and plan is not None and plan.source != family_of(teacher).shape(teacher):
        plan = None  # of a later step than the one from this teacher
    return corresponding(student, family_of(teacher).shape(teacher), plan, settings.blocks)
