"""From a config to a Composer trainer."""

import contextlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from composer import Callback, Trainer
from composer.algorithms import GradientClipping
from composer.callbacks import LRMonitor, SpeedMonitor
from composer.core import Time, TimeUnit
from composer.loggers import LoggerDestination, TensorboardLogger, WandBLogger
from composer.optim import (
    ComposerScheduler,
    ConstantWithWarmupScheduler,
    CosineAnnealingWithWarmupScheduler,
    DecoupledAdamW,
    LinearWithWarmupScheduler,
)
from composer.utils import dist, get_device
from torch.utils.data import DataLoader
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmprune.callbacks.l0_pruning import L0Pruning, make_goal
from llmprune.callbacks.load_shards import LoadShards
from llmprune.callbacks.loss_guard import LossGuard
from llmprune.callbacks.metrics_file import MetricsFile
from llmprune.config import Config, LoggersConfig, OptimizerConfig, SchedulerConfig, save_config
from llmprune.data.dataset import EvalDataset, MixedDataset
from llmprune.data.format import DataManifest, tokenizer_fingerprint
from llmprune.errors import UserError, nearest
from llmprune.families import family_of
from llmprune.models.causal_lm import ComposerCausalLM
from llmprune.models.loading import empty_model, load_model, load_tokenizer, new_model
from llmprune.models.loading import load_config as load_model_config
from llmprune.run_folder import Manifest, RunFolder, git_commit, versions
from llmprune.sharding import check_sharding, parallelism

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "decoupled_adamw": DecoupledAdamW,
    "adamw": torch.optim.AdamW,
}
SCHEDULERS: dict[str, Callable[[SchedulerConfig], ComposerScheduler]] = {
    "cosine": lambda c: CosineAnnealingWithWarmupScheduler(t_warmup=c.warmup, alpha_f=c.final),
    "linear": lambda c: LinearWithWarmupScheduler(t_warmup=c.warmup, alpha_f=c.final),
    "constant": lambda c: ConstantWithWarmupScheduler(t_warmup=c.warmup),
}


@dataclass
class Ingredients:
    """What a run needs to know of its inputs, checked before any weight is loaded."""

    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    data: DataManifest


def check(config: Config) -> Ingredients:
    """Check everything that can be checked without loading weights or training.

    Raises:
        UserError: something does not fit; the message says what and how to mend it.
    """
    _check_choices(config)
    data = DataManifest.load(config.data.path)
    if (config.model.path is None) == (config.model.config is None):
        raise UserError("give either model.path (a checkpoint) or model.config (random weights), not both")
    tokenizer_at = config.model.tokenizer or config.model.path or f"{config.data.path}/tokenizer"
    if config.model.path is not None:
        model_config = load_model_config(config.model.path)
        tokenizer = load_tokenizer(tokenizer_at)
    else:
        tokenizer = load_tokenizer(tokenizer_at)
        model_config = config_from_fields(config.model.config or {}, tokenizer)
    if tokenizer_fingerprint(tokenizer) != data.tokenizer:
        raise UserError(
            f"the tokenizer of {tokenizer_at} did not make the data in {config.data.path}: prepare the data with it "
            f"(python -m data_prep tokenize … --tokenizer {tokenizer_at})"
        )
    if model_config.vocab_size < data.vocab_size:
        raise UserError(
            f"the model's vocabulary ({model_config.vocab_size}) is smaller than the data's ({data.vocab_size}): "
            "use the model's own tokenizer"
        )
    limit = getattr(model_config, "max_position_embeddings", None)
    if limit is not None and data.sequence_length > limit:
        raise UserError(f"the data's samples have {data.sequence_length} tokens, the model takes {limit}")
    family = family_of(model_config)
    if config.l0_pruning is not None:
        make_goal(family, family.shape(model_config), config.l0_pruning)
    return Ingredients(model_config, tokenizer, data)


def build_trainer(config: Config) -> Trainer:
    """Check the config, make the run folder ready and build the trainer.

    Raises:
        UserError: see ``check`` and ``RunFolder.prepare``.
    """
    inputs = check(config)
    share_cores()
    dist.initialize_dist(get_device(config.train.device))
    run = RunFolder(Path(config.run.folder))
    manifest = _manifest(config, inputs)
    resume = on_rank_zero(lambda: run.prepare(overwrite=config.run.overwrite, autoresume=config.run.autoresume))
    if resume is not None:
        check_same_model(run.checkpoints, manifest, inputs.model_config)
    model = make_model(config, inputs)
    if resume is None:
        on_rank_zero(lambda: _write_run(config, run, manifest, model, inputs.tokenizer))
    train, evaluation = make_loaders(config)
    wrapped = ComposerCausalLM(model, {number: evaluation.domains[number] for number in evaluation.domains_present})
    optimizer = make_optimizer(config.optimizer, wrapped)
    per_rank = config.train.global_batch_size // dist.get_world_size()
    eval_batch = per_rank if config.train.microbatch_size == "auto" else int(config.train.microbatch_size)
    clipping = config.train.clip_norm
    return Trainer(
        model=wrapped,
        run_name=config.run.name,
        seed=config.run.seed,
        device=config.train.device,
        train_dataloader=train,
        eval_dataloader=_eval_loader(evaluation, eval_batch),
        max_duration=config.train.duration,
        eval_interval=interval(config.train.eval_interval, config.train.duration),
        optimizers=optimizer,
        schedulers=SCHEDULERS[config.scheduler.name](config.scheduler),
        step_schedulers_every_batch=True,
        algorithms=[] if clipping is None else [GradientClipping("norm", clipping_threshold=clipping)],
        callbacks=make_callbacks(config, run, resumed=resume is not None),
        loggers=make_loggers(config.loggers, run, config.run.name),
        progress_bar=not config.loggers.console,
        log_to_console=config.loggers.console,
        console_log_interval=config.loggers.console_interval,
        precision=config.train.precision,
        device_train_microbatch_size=config.train.microbatch_size,
        parallelism_config=parallelism(config.sharding, config.train.activation_checkpointing),
        save_folder=str(run.checkpoints),
        save_filename="ba{batch}-rank{rank}.pt",
        save_latest_filename="latest-rank{rank}.pt",
        save_interval=interval(config.checkpoint.interval, config.train.duration),
        save_num_checkpoints_to_keep=config.checkpoint.keep,
        save_overwrite=True,
        load_path=None if resume is None else str(resume),
    )


def train(config: Config) -> Trainer:
    """Run the job that ``config`` describes, to its end; a resumed run that has ended already is left as it is."""
    trainer = build_trainer(config)
    if config.train.eval_first and trainer.state.timestamp.batch.value == 0:
        trainer.eval()
    assert trainer.state.max_duration is not None
    if trainer.state.timestamp < trainer.state.max_duration:
        trainer.fit()
    else:
        print(f"{config.run.folder} is complete: nothing is left to do until train.duration is raised")
    trainer.close()
    return trainer


def share_cores() -> None:
    """Give every rank of this machine its share of the cores: more threads than cores slow each other down manifold.

    ``OMP_NUM_THREADS`` overrides.
    """
    ranks = dist.get_local_world_size()
    if ranks > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))


def interval(every: str, duration: str) -> int | Time[int]:
    """An interval for Composer, which knows no shares of an endless stream: a share becomes a number; zero = never."""
    time, whole = Time.from_timestring(every), Time.from_timestring(duration)
    if not time.value:
        return 0
    if time.unit == TimeUnit.DURATION:
        return Time(max(1, round(time.value * whole.value)), whole.unit)
    return time


def config_from_fields(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """A Hugging Face config from its fields; vocabulary and special tokens come from the tokenizer unless given.

    Raises:
        UserError: the model type is missing or unsupported, or a field is unknown.
    """
    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type is None or model_type not in CONFIG_MAPPING:
        raise UserError(f"model.config.model_type '{model_type}' is unknown: name one such as llama")
    known = vars(CONFIG_MAPPING[model_type]())
    for name in values:
        if name not in known:
            raise UserError(f"model.config has the unknown field '{name}'; {nearest(name, known)}")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CONFIG_MAPPING[model_type](**{"vocab_size": len(tokenizer), **special, **values})
    family_of(config)
    return config


def make_model(config: Config, inputs: Ingredients) -> PreTrainedModel:
    """The model to train, in the dtype asked for.

    Sharded, a model from disk is still empty (``LoadShards`` fills it) and one with random weights is made on rank 0
    alone, from where Composer spreads it.
    """
    dtype, attention = DTYPES[config.model.dtype], config.model.attention
    if config.model.path is None:
        elsewhere = config.sharding is not None and dist.get_global_rank() != 0
        with torch.device("meta") if elsewhere else contextlib.nullcontext():
            model = new_model(inputs.model_config, seed=config.run.seed, attention=attention).to(dtype)
    elif config.sharding is not None:
        model = empty_model(config.model.path, dtype=dtype, attention=attention)
    else:
        model = load_model(config.model.path, dtype=dtype, attention=attention)
    if config.train.activation_checkpointing and config.sharding is None:  # sharded, Composer does it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def make_loaders(config: Config) -> tuple[DataLoader[Any], EvalDataset]:
    """The training stream of this rank, and the evaluation samples."""
    world_size = dist.get_world_size()
    train = MixedDataset(
        config.data.path,
        global_batch_size=config.train.global_batch_size,
        weights=config.data.weights,
        seed=config.run.seed,
        rank=dist.get_global_rank(),
        world_size=world_size,
        shuffle_window=config.data.shuffle_window,
    )
    loader: DataLoader[Any] = DataLoader(
        train,
        batch_size=config.train.global_batch_size // world_size,
        num_workers=config.data.workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=config.data.workers > 0,
    )
    return loader, EvalDataset(config.data.path, config.data.eval_samples_per_domain)


def _eval_loader(dataset: EvalDataset, batch_size: int) -> DataLoader[Any]:
    sampler = dist.get_sampler(dataset, shuffle=False)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler)


def make_optimizer(config: OptimizerConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The model's optimiser."""
    return OPTIMIZERS[config.name](
        model.parameters(),
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def make_callbacks(config: Config, run: RunFolder, *, resumed: bool) -> list[Callback]:
    """The callbacks of a run; a resumed one has its weights in the checkpoint."""
    callbacks: list[Callback] = [LossGuard(), LRMonitor(), SpeedMonitor(window_size=10)]
    if config.sharding is not None and config.model.path is not None and not resumed:
        callbacks.append(LoadShards(config.model.path))
    if config.l0_pruning is not None:
        callbacks.append(L0Pruning(config.l0_pruning, seed=config.run.seed, folder=run.gates))
    return callbacks


def make_loggers(config: LoggersConfig, run: RunFolder, name: str) -> list[LoggerDestination]:
    """Where metrics go: always metrics.jsonl, and what the config asks for."""
    loggers: list[LoggerDestination] = [MetricsFile(run.metrics)]
    if config.tensorboard:
        loggers.append(TensorboardLogger(log_dir=str(run.path / "tensorboard"), flush_interval=100))
    if config.wandb is not None:
        settings = {"mode": "offline"} if config.wandb.offline else {}
        loggers.append(
            WandBLogger(
                project=config.wandb.project,
                entity=config.wandb.entity,
                group=config.wandb.group,
                name=name,
                tags=config.wandb.tags,
                init_kwargs={"dir": str(run.path), **settings},
            )
        )
    return loggers


def check_same_model(checkpoints: Path, manifest: Manifest, model_config: PretrainedConfig) -> None:
    """Check that the checkpoints of a run are of the model and the target that the config names now.

    Raises:
        UserError: they are not.
    """
    saved = Manifest.load(checkpoints)
    family = family_of(model_config)
    saved_config = load_model_config(checkpoints / "model")
    if saved.family != family.name or family.shape(saved_config) != family.shape(model_config):
        raise UserError(
            f"the checkpoints in {checkpoints} are of a {saved.family} model with "
            f"{family.shape(saved_config)}; the config's "
            f"model has {family.shape(model_config)}: resume with the model that the run began with, or "
            f"use another folder"
        )
    for key in ("target", "target_sparsity", "gates"):
        before, now = ((m.l0_pruning or {}).get(key) for m in (saved, manifest))
        if before != now:
            raise UserError(
                f"the checkpoints in {checkpoints} are of a run with l0_pruning.{key} {before}; the config asks for "
                f"{now}: keep the target, or use another run.folder"
            )


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 alone and give every rank its result or its ``UserError``."""
    outcome: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = str(error)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    result: T = outcome[0]
    return result


def _manifest(config: Config, inputs: Ingredients) -> Manifest:
    return Manifest(
        family=family_of(inputs.model_config).name,
        l0_pruning=None if config.l0_pruning is None else asdict(config.l0_pruning),
        source=config.model.path or "random",
        data={"path": config.data.path, "tokenizer": inputs.data.tokenizer},
        seed=config.run.seed,
        versions=versions(),
        git_commit=git_commit(),
    )


def _write_run(
    config: Config, run: RunFolder, manifest: Manifest, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    save_config(config, run.config)
    manifest.save(run.checkpoints, model, tokenizer)


def _check_choices(config: Config) -> None:
    for key, value, valid in (
        ("optimizer.name", config.optimizer.name, OPTIMIZERS),
        ("scheduler.name", config.scheduler.name, SCHEDULERS),
        ("model.dtype", config.model.dtype, DTYPES),
        ("train.precision", config.train.precision, ("fp32", "amp_bf16", "amp_fp16")),
        ("model.attention", config.model.attention, ("sdpa", "eager", "flash_attention_2")),
    ):
        if value not in valid:
            raise UserError(f"{key} '{value}' is unknown; {nearest(value, valid)}")
    for wanted, package, extra in (
        (config.model.attention == "flash_attention_2", "flash_attn", "gpu"),
        (config.loggers.wandb is not None, "wandb", "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"the package {package} is not installed: pip install -e '.[{extra}]'")
    for key, value in (
        ("train.duration", config.train.duration),
        ("train.eval_interval", config.train.eval_interval),
        ("checkpoint.interval", config.checkpoint.interval),
        ("scheduler.warmup", config.scheduler.warmup),
    ):
        try:
            Time.from_timestring(value)
        except ValueError:
            raise UserError(f"{key} '{value}' is no duration: write 100ba, 1000000tok or 0.1dur") from None
    duration, warmup = Time.from_timestring(config.train.duration), Time.from_timestring(config.scheduler.warmup)
    if duration.unit not in (TimeUnit.BATCH, TimeUnit.TOKEN, TimeUnit.SAMPLE) or duration.value < 1:
        raise UserError(
            f"train.duration '{config.train.duration}' must be positive, in ba, sp or tok: the stream has no end"
        )
    if warmup.value and warmup.unit not in (TimeUnit.DURATION, duration.unit):
        raise UserError(
            f"scheduler.warmup '{config.scheduler.warmup}' must have the unit of train.duration "
            f"('{config.train.duration}') or be a share such as 0.03dur"
        )
    world_size = dist.get_world_size()
    batch, microbatch = config.train.global_batch_size, config.train.microbatch_size
    if batch < 1 or batch % world_size:
        raise UserError(f"train.global_batch_size {batch} must be a positive multiple of the {world_size} ranks")
    if microbatch != "auto" and not (isinstance(microbatch, int) and microbatch >= 1):
        raise UserError(f"train.microbatch_size '{microbatch}' must be a positive whole number or auto")
    on_cpu = get_device(config.train.device).name == "cpu"
    for refused, where in (
        (config.sharding is not None, "with sharding"),
        (config.l0_pruning is not None, "while gates train"),
        (on_cpu, "on CPUs"),
    ):
        if refused and microbatch == "auto":
            raise UserError(f"train.microbatch_size=auto does not work {where}: give a number")
    if config.sharding is not None:
        check_sharding(config.sharding, on_cpu=on_cpu)
    if config.train.precision != "fp32" and on_cpu:
        raise UserError(f"train.precision {config.train.precision} needs a GPU; on CPUs use fp32")
