"""All checks of a run that are possible before weights are loaded or files are written."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from composer.core import Time
from composer.utils import dist, get_device

from llmprune.callbacks.registered import CALLBACKS
from llmprune.config.left_open import fill_in
from llmprune.config.schema import Config
from llmprune.config.section_registry import sections_of
from llmprune.config.sharding import check_sharding
from llmprune.config.static_checks import check_config
from llmprune.data.format import EVAL, TRAIN, DataManifest, tokenizer_fingerprint
from llmprune.data.prepared import PreparedData
from llmprune.models.loading import config_from_fields, count_parameters, load_model_config, load_tokenizer
from llmprune.models.own_model_types import with_richer_heads
from llmprune.models.source import find_folder, longest_input
from llmprune.training.loggers import LOGGERS
from llmprune.training.section import Inputs, Section
from llmprune.utils.checksums import VERIFICATION
from llmprune.utils.errors import UserError


def check(config: Config) -> Inputs:
    """Check a config and open its inputs.

    Raises:
        UserError: the config, the model and the data do not fit; the message gives the cause and the remedy.
    """
    check_config(config)
    _check_packages(config)
    _check_devices(config)
    _check_remote(config)
    if config.model.verify:
        VERIFICATION.asked = True
    data = PreparedData(config.data.path, config.data.cache)
    if (config.model.path is None) == (config.model.config is None):
        raise UserError("give either model.path (a checkpoint) or model.config (random weights), not both")
    if config.model.richer_heads is not None and config.model.config is None:
        raise UserError(
            "model.richer_heads goes with model.config: a model that is there gets them by `llmprune enrich MODEL`"
        )
    source = None if config.model.path is None else find_folder(config.model.path)
    tokenizer_at = config.model.tokenizer or source or str(data.tokenizer)
    if source is not None:
        model_config = load_model_config(source)
        tokenizer = load_tokenizer(tokenizer_at)
    else:
        tokenizer = load_tokenizer(tokenizer_at)
        model_config = config_from_fields(config.model.config or {}, tokenizer)
        if config.model.richer_heads is not None:
            config.model.richer_heads.check()
            model_config = with_richer_heads(model_config, config.model.richer_heads)
    if tokenizer_fingerprint(tokenizer) != data.manifest.tokenizer:
        raise UserError(
            f"the tokenizer of {tokenizer_at} did not make the data in {config.data.path}: prepare the data with it "
            f"(python -m data_prep tokenize … --tokenizer {tokenizer_at})"
        )
    if model_config.vocab_size < data.manifest.vocab_size:
        raise UserError(
            f"the model's vocabulary ({model_config.vocab_size}) is smaller than the data's "
            f"({data.manifest.vocab_size}): use the model's own tokenizer"
        )
    limit = longest_input(model_config)
    length = data.manifest.sequence_length
    if limit is not None and length > limit:
        raise UserError(f"the data's samples have {length} tokens, the model takes {limit}")
    inputs = Inputs(source, model_config, tokenizer, data, sections_of(config))
    rate = math.prod(section.rate for section in inputs.sections)
    fill_in(config, parameters=count_parameters(model_config), length=length, rate=rate)
    _check_numbers(config)
    _check_batch(config.samples_per_step, data.manifest)
    _check_together(inputs.sections)
    for section in inputs.sections:
        section.check_inputs(inputs)
    _check_evaluation(config, inputs)
    return inputs


def _check_together(sections: Sequence[Section[Any]]) -> None:
    """Refuse sections that contradict each other because they decide the same thing."""
    pruning = [section.name for section in sections if section.prunes]
    choosing = [section.name for section in sections if section.chooses_weights]
    if len(pruning) > 1:
        raise UserError(f"a run has {' or '.join(pruning)}, not both")
    if len(choosing) > 1:
        raise UserError(f"{' and '.join(choosing)} both say what trains: leave one out")
    if choosing and pruning:
        raise UserError(f"{pruning[0]} decides itself what trains: leave out {choosing[0]}")


def _check_evaluation(config: Config, inputs: Inputs) -> None:
    """Check that there are evaluation samples if the job needs them."""
    interval = config.train.eval_interval
    asked = [] if trains(inputs) else ["a job that does not train"]
    asked += [what for section in inputs.sections if (what := section.needs_evaluation) is not None]
    if config.train.eval_first:
        asked.append("train.eval_first")
    if Time.from_timestring(interval).value > 0:
        asked.append(f"train.eval_interval={interval}")
    if asked and not inputs.data.domains_with(EVAL):
        instead = ", or train without evaluation (train.eval_interval=0ba)" if asked[0].endswith(interval) else ""
        raise UserError(
            f"{inputs.data.location} has no evaluation samples, and {asked[0]} needs them: prepare it with a larger "
            f"--eval-fraction{instead}"
        )


def trains(inputs: Inputs) -> bool:
    """Whether the job trains any weights; a section may ask only for a computation."""
    return all(section.trains for section in inputs.sections)


def inputs_of(config: Config) -> list[str]:
    """Paths that a job reads and that may be folders or files of this machine; URLs are left out."""
    named = [config.model.path, config.model.tokenizer, config.data.path]
    for section in sections_of(config):
        named += [*section.models(), *section.files()]
    return [path for path in named if path and "://" not in path]


def _check_packages(config: Config) -> None:
    for wanted, package, extra in (
        (config.model.attention == "flash_attention_2", "flash_attn", "gpu"),
        (config.loggers.wandb is not None, "wandb", "wandb"),
        ("mlflow" in config.loggers.others, "mlflow", None),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            how = package if extra is None else f"-e '.[{extra}]'"
            raise UserError(f"the package {package} is not installed: pip install {how}")
    for name, arguments in config.callbacks.items():
        CALLBACKS.check_arguments(name, arguments)
    for name, arguments in config.loggers.others.items():
        LOGGERS.check_arguments(name, arguments)


def _check_numbers(config: Config) -> None:
    """Check numbers that depend on each other or on the ranks; ranges are declared in the schema."""
    batch, ranks = config.samples_per_step, dist.get_world_size()
    partitions, keep = config.data.partitions, config.checkpoint.keep
    for key, value, good, wanted in (
        ("optimizer.betas", config.optimizer.betas, len(config.optimizer.betas) == 2, "be two numbers in [0, 1)"),
        ("train.global_batch_size", batch, batch % ranks == 0, f"be a positive multiple of the {ranks} ranks"),
        ("data.partitions", partitions, batch % partitions == 0, f"divide the global batch of {batch}"),
        ("checkpoint.keep", keep, keep == -1 or keep >= 1, "be positive, or -1 for all"),
    ):
        if not good:
            raise UserError(f"{key} is {value}; it must {wanted}")


def _check_batch(batch: int, data: DataManifest) -> None:
    """Refuse a batch larger than the training data, before anything of the batch's size is allocated."""
    samples = sum(data.samples(domain, TRAIN) for domain in data.domains)
    if batch > samples:
        raise UserError(
            f"train.global_batch_size is {batch:,}, but the data have {samples:,} training samples in all: choose a "
            "smaller batch, or prepare more data"
        )


def _check_devices(config: Config) -> None:
    if config.train.device == "gpu" and not torch.cuda.is_available():
        raise UserError("train.device is gpu, but this machine has no GPU")
    on_cpu = get_device(config.train.device).name == "cpu"
    for refused, where in (
        (config.sharding is not None, "with sharding"),
        *((True, where) for section in sections_of(config) if (where := section.no_auto_microbatch) is not None),
        (on_cpu, "on CPUs"),
    ):
        if refused and config.train.microbatch_size == "auto":
            raise UserError(f"train.microbatch_size=auto does not work {where}: give a number")
    if config.sharding is not None:
        check_sharding(config.sharding, on_cpu=on_cpu)


def _check_remote(config: Config) -> None:
    remote, run = config.checkpoint.remote, Path(config.run.folder).resolve()
    if remote is not None and "://" not in remote:
        place = Path(remote).resolve()
        if place == run or run in place.parents or place in run.parents:
            raise UserError("checkpoint.remote and run.folder must not be inside each other: choose another place")


def data_contents(path: str | Path, data: DataManifest) -> dict[str, str]:
    """Description of the data for a run's manifest: path, the tokenizer's hash, and the hash of the data's manifest."""
    return {"path": str(path), "tokenizer": data.tokenizer, "contents": data.fingerprint()}
