"""Build a Composer trainer from a config."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Trainer
from composer.algorithms import GradientClipping
from composer.callbacks import LRMonitor, SpeedMonitor
from composer.core import Algorithm, DataSpec, Time, TimeUnit
from composer.utils import dist, get_device
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from llmprune.callbacks.checkpoint_uploading import CheckpointUploading
from llmprune.callbacks.domain_losses import DomainLosses
from llmprune.callbacks.dynamic_loading import DynamicLoading
from llmprune.callbacks.load_shards import LoadShards
from llmprune.callbacks.loss_guard import LossGuard
from llmprune.callbacks.preemption import Preemption
from llmprune.callbacks.registered import added_callbacks
from llmprune.callbacks.save_guard import SaveGuard
from llmprune.callbacks.watchdog import Watchdog
from llmprune.checkpoints.checkpoint_folder import CheckpointFolder
from llmprune.checkpoints.run_folder import RANDOM, Manifest, RunFolder, check_unused, fetch_run, git_commit, versions
from llmprune.config.job_files import save_config
from llmprune.config.optimizers import OPTIMIZERS, SCHEDULERS
from llmprune.config.schema import Config
from llmprune.config.sharding import AverageGradients, parallelism
from llmprune.conversion.stored_state import safe_unpickling
from llmprune.data.dataset import EvalDataset
from llmprune.estimate.job import check_fits
from llmprune.models.batch_halving import Halving
from llmprune.models.causal_lm import ComposerCausalLM, count_tokens
from llmprune.models.families import family_of
from llmprune.models.loading import empty_model, load_model, new_model
from llmprune.models.number_formats import DTYPES, precision_of
from llmprune.training.checks import check, data_contents, inputs_of, trains
from llmprune.training.loaders import eval_loader, make_loaders
from llmprune.training.loggers import make_loggers
from llmprune.training.resuming import check_same_run
from llmprune.training.section import Build, Inputs
from llmprune.utils.object_store import Store, open_store
from llmprune.utils.outputs import refuse_replacing
from llmprune.utils.processes import TERMINATION
from llmprune.utils.ranks import PATIENCE, init_distributed, on_rank_zero, share_cores
from llmprune.utils.recorded_settings import as_typed


def prepare_job(config: Config) -> Inputs:
    """Check the config and connect the ranks.

    Raises:
        UserError: see ``check``.
    """
    inputs = check(config)
    share_cores()
    patience = config.train.hang_timeout  # ``Watchdog`` acts before collectives time out, with a better message
    init_distributed(config.train.device, PATIENCE if patience is None else 2 * patience + 10 * 60)
    return inputs


def build_trainer(config: Config, inputs: Inputs | None = None, callbacks: Sequence[Callback] = ()) -> Trainer:
    """Prepare the run folder and build the trainer.

    Args:
        config: config of the run.
        inputs: result of ``prepare_job`` for this config; None = ``prepare_job`` is called.
        callbacks: further Composer callbacks, placed after llmprune's own.

    Raises:
        UserError: see ``check`` and ``RunFolder.find``.
    """
    inputs = inputs or prepare_job(config)
    build, store = _begin(config, inputs)
    for section in inputs.sections:
        section.begin(build)
    if build.resume is not None:
        check_same_run(build.folder, _manifest(config, inputs), config, inputs.model_config)
    model = build.model = make_model(config, inputs)
    instead = None
    for section in inputs.sections:
        section.model_loaded(build)
        instead = section.dataset(build) or instead
    stream, train, evaluation = make_loaders(config, inputs.data, instead)
    present = [] if evaluation is None else evaluation.domains_present
    build.stream, build.evaluated = stream, {number: stream.domains[number] for number in present}
    wrapped = ComposerCausalLM(model, build.evaluated, products=torch.bfloat16 if _own_autocast(config) else None)
    if config.train.microbatch_size == "auto":
        wrapped.halving = Halving()
    own = _own_callbacks(build, store, replaced=instead is not None)
    for section in inputs.sections:
        own += section.callbacks(build)
    own += [*added_callbacks(config.callbacks), *callbacks]
    optimizer = OPTIMIZERS[config.optimizer.name](wrapped.parameters(), config.optimizer)
    on_rank_zero(lambda: _write_run(build, _manifest(config, inputs)))  # after this, nothing of the YAML is refused
    return _compose(build, wrapped, optimizer, train, evaluation, own)


def _begin(config: Config, inputs: Inputs) -> tuple[Build, Store | None]:
    """Check that the run may use its folder, and find the checkpoint to resume from; nothing is written."""
    run = RunFolder(Path(config.run.folder))
    store = None if config.checkpoint.remote is None else open_store(config.checkpoint.remote)
    if store is not None and config.run.autoresume:
        fetch_run(run, store)
    resume = on_rank_zero(lambda: run.find(overwrite=config.run.overwrite, autoresume=config.run.autoresume))
    if resume is None:
        refuse_replacing(run.path, inputs_of(config))
    if store is not None and not config.run.autoresume:
        on_rank_zero(lambda: check_unused(store))
    if config.train.check_memory:
        on_rank_zero(lambda: check_fits(config, inputs.model_config, inputs.data.manifest.sequence_length))
    return Build(config, inputs, run, resume), store


def _own_autocast(config: Config) -> bool:
    """Whether the model itself casts products to bfloat16: Composer does so on GPUs only."""
    return get_device(config.train.device).name == "cpu" and _precision(config) == "amp_bf16"


def _precision(config: Config) -> str:
    return precision_of(config.train.precision, on_gpu=get_device(config.train.device).name == "gpu")


def _compose(
    build: Build,
    model: ComposerCausalLM,
    optimizer: Optimizer,
    train: DataLoader[Any],
    evaluation: EvalDataset | None,
    callbacks: list[Callback],
) -> Trainer:
    """Make Composer's trainer."""
    config, inputs, run, resume = build.config, build.inputs, build.folder, build.resume
    per_rank = config.samples_per_step // dist.get_world_size()
    eval_batch = per_rank if config.train.microbatch_size == "auto" else int(config.train.microbatch_size)
    algorithms: list[Algorithm] = []
    if config.train.clip_norm is not None:
        algorithms.append(GradientClipping("norm", clipping_threshold=config.train.clip_norm))
    if config.sharding is not None and get_device(config.train.device).name == "cpu":  # gloo sums, without averaging
        algorithms.append(AverageGradients())  # after a batch, Composer runs the algorithms in reverse order
    with contextlib.nullcontext() if resume is None else safe_unpickling(resume), no_needless_warnings():
        return Trainer(
            model=model,
            run_name=config.run.name,
            seed=config.run.seed,
            device=config.train.device,
            train_dataloader=DataSpec(train, get_num_tokens_in_batch=count_tokens),
            accumulate_train_batch_on_tokens=True,
            eval_dataloader=None if evaluation is None else eval_loader(evaluation, eval_batch),
            max_duration=config.train.duration if trains(inputs) else "1ba",
            eval_interval=interval(config.train.eval_interval, config.train.duration),
            optimizers=optimizer,
            schedulers=SCHEDULERS[config.scheduler.name](config.scheduler),
            step_schedulers_every_batch=True,
            algorithms=algorithms,
            callbacks=callbacks,
            loggers=make_loggers(config.loggers, run, config.run.name),
            progress_bar=False,
            log_to_console=False,  # ``ConsoleLines`` prints less
            precision="fp32" if _own_autocast(config) else _precision(config),
            device_train_microbatch_size=config.train.microbatch_size,
            parallelism_config=parallelism(config.sharding, config.train.activation_checkpointing),
            save_folder=str(run.checkpoints),
            save_filename="ba{batch}-rank{rank}.pt",
            save_latest_filename="latest-rank{rank}.pt",
            save_interval=interval(config.checkpoint.interval, config.train.duration),
            save_num_checkpoints_to_keep=-1,  # CheckpointUploading deletes them
            save_overwrite=True,
            load_path=None if resume is None else str(resume),
        )


@contextlib.contextmanager
def no_needless_warnings() -> Iterator[None]:
    """While open, Composer does not warn of what is meant so."""
    with warnings.catch_warnings():
        for meant in (
            "Specifying the ProgressBarLogger",  # llmprune's progress bar has no state
            "The warmup duration is 0",  # a share of a short run
            "Cannot split tensor of length",  # a batch that is smaller than a microbatch
        ):
            warnings.filterwarnings("ignore", meant)
        yield


def checkpoint_uploading_of(trainer: Trainer) -> CheckpointUploading:
    """The callback that manages the checkpoints of a trainer's run."""
    return next(callback for callback in trainer.state.callbacks if isinstance(callback, CheckpointUploading))


def interval(every: str, duration: str) -> int | Time[int]:
    """An interval for Composer, which has no shares of an endless stream: a share becomes a number; zero = never."""
    time, whole = Time.from_timestring(every), Time.from_timestring(duration)
    if not time.value:
        return 0
    if time.unit == TimeUnit.DURATION:
        return Time(max(1, round(time.value * whole.value)), whole.unit)
    return time


def make_model(config: Config, inputs: Inputs) -> PreTrainedModel:
    """Make the model to train, in the configured dtype.

    With sharding, a model from disk is still empty (``LoadShards`` fills it); a model with random weights is made on
    rank 0 only, and Composer distributes it from there.
    """
    dtype, attention = DTYPES[config.model.dtype], config.model.attention
    source = inputs.source
    if source is None:
        elsewhere = config.sharding is not None and dist.get_global_rank() != 0
        with torch.device("meta") if elsewhere else contextlib.nullcontext():
            model = new_model(inputs.model_config, seed=config.run.seed, attention=attention).to(dtype)
    elif config.sharding is not None:
        model = empty_model(source, dtype=dtype, attention=attention)
    else:
        packed = (section.quantization(inputs) for section in inputs.sections)
        quantization = next((each for each in packed if each is not None), None)
        model = load_model(source, dtype=dtype, attention=attention, quantization=quantization)
    if config.train.activation_checkpointing and config.sharding is None:  # with sharding, Composer does it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _own_callbacks(build: Build, store: Store | None, *, replaced: bool) -> list[Callback]:
    """The callbacks that every run has.

    Args:
        build: run that is being built; a resumed run reads its weights from the checkpoint.
        store: remote store that checkpoints are copied to; None = none.
        replaced: whether the run trains on another dataset than the prepared data.
    """
    config, run, resumed = build.config, build.folder, build.resume is not None
    guard = LossGuard(config.train.loss_spike_factor, skip=config.train.loss_spike == "skip")
    callbacks: list[Callback] = [guard, LRMonitor(), SpeedMonitor(window_size=10), Preemption(TERMINATION)]
    if config.train.hang_timeout is not None:
        callbacks.insert(0, Watchdog(config.train.hang_timeout))
    if config.sharding is not None and build.inputs.source is not None and not resumed:
        callbacks.append(LoadShards(build.inputs.source, lambda name: _source_name(name, build.inputs)))
    callbacks.append(DomainLosses(build.evaluated))
    if not replaced and not any(section.mixes for section in build.inputs.sections):
        assert build.stream is not None
        callbacks.append(DynamicLoading(None, build.stream, build.evaluated.values()))
    callbacks.append(SaveGuard(CheckpointFolder(run.checkpoints)))
    writers = dist.get_world_size() // (1 if config.sharding is None else config.sharding.replicas)
    callbacks.append(CheckpointUploading(run.path, config.checkpoint.keep, store, writers=writers, resumed=resumed))
    return callbacks


def _source_name(name: str, inputs: Inputs) -> str | None:
    """Name that a parameter of the run's model has in the source model's files; None = a section has added it."""
    found: str | None = name
    for section in inputs.sections:
        found = None if found is None else section.source_name(section.own, found)
    return found


def _manifest(config: Config, inputs: Inputs) -> Manifest:
    return Manifest(
        family=family_of(inputs.model_config).name,
        source=as_typed(config.model.path or RANDOM, "model.path"),
        data=data_contents(as_typed(config.data.path, "data.path"), inputs.data.manifest),
        seed=config.run.seed,
        versions=versions(),
        git_commit=git_commit(),
        sections={s.name: kept for s in inputs.sections if (kept := s.recorded()) is not None},
    )


def _write_run(build: Build, manifest: Manifest) -> None:
    config, run = build.config, build.folder
    if build.resume is None:
        run.create()
        source = build.inputs.source
        assert build.model is not None
        where = None if source is None else source.path
        manifest.save(run.checkpoints, build.model.config, build.inputs.tokenizer, where)
    else:
        CheckpointFolder(run.checkpoints).keep(config.checkpoint.keep, build.resume)
    save_config(config, run.config)
