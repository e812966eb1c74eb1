"""Memory of every rank, time and cost of a training job, estimated before anything is loaded."""

import gc
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from composer.core import Time, TimeUnit
from composer.utils import dist, get_device
from transformers import PretrainedConfig

from llmprune.config.left_open import fill_in
from llmprune.config.schema import Config
from llmprune.config.static_checks import check_config
from llmprune.data.prepared import PreparedData
from llmprune.estimate.memory import memory_of, samples_of
from llmprune.estimate.needs import FLOAT, JobSizes, checkpoint_bytes, products_of
from llmprune.models.flops import macs, step_flops
from llmprune.models.loading import config_from_fields, count_parameters, load_model_config, load_tokenizer
from llmprune.models.number_formats import DTYPES
from llmprune.models.own_model_types import with_richer_heads
from llmprune.utils.errors import UserError

HELP_WITH_MEMORY = "more ranks with sharding={}, a smaller train.microbatch_size, train.activation_checkpointing=true"


@dataclass(frozen=True)
class Cluster:
    """The hardware that the job runs on.

    Attributes:
        gpus: number of ranks (GPUs) in total.
        memory: memory of each rank, in bytes.
        per_node: number of ranks per node.
        flops: peak FLOPs per second of each GPU, in the dtype of the matrix products.
        utilisation: share of the peak FLOPs that training reaches.
        bandwidth: bytes per second between a GPU and the GPUs of other nodes.
        bandwidth_within: bytes per second between two GPUs of a node.
        price: price of a GPU for an hour; None = no cost is computed.
        device: device type, "cuda" or "cpu".
    """

    gpus: int
    memory: float
    per_node: int = 8
    flops: float = 989e12
    utilisation: float = 0.4
    bandwidth: float = 50e9
    bandwidth_within: float = 400e9
    price: float | None = None
    device: str = "cuda"

    def check(self) -> None:
        """Raise ``UserError`` for numbers that are not positive."""
        for name in ("gpus", "memory", "per_node", "flops", "utilisation", "bandwidth", "bandwidth_within"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be positive")


@dataclass(frozen=True)
class Estimate:
    """The estimated memory, time and cost of a job.

    Attributes:
        memory: bytes of every rank at the peak, by purpose.
        available: memory of a rank, in bytes.
        step_s: seconds of a batch.
        compute_s: seconds of computation of a batch at the assumed utilisation.
        network_s: seconds of communication of a batch; communication overlaps with computation.
        steps: number of batches of the job.
        tokens: number of tokens that the job trains on.
        cost: cost of the job, in the currency of the GPU's price; None = no price was given.
        facts: further numbers: parameters, trained parameters, FLOPs of a batch, GPU hours, bytes of a checkpoint, and
            the largest number of checkpoints at a time (-1 = all are kept).
    """

    memory: dict[str, float]
    available: float
    step_s: float
    compute_s: float
    network_s: float
    steps: float
    tokens: float
    cost: float | None
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Bytes of a rank at the peak."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the job fits into the memory of a rank."""
        return self.total <= self.available

    def as_dict(self) -> dict[str, Any]:
        """The estimate as values for JSON."""
        return {"schema": 1, **asdict(self), "total_bytes": self.total, "fits": self.fits}

    def __str__(self) -> str:
        lines = [f"{name:34}{size / 1e9:10.2f} GB" for name, size in self.memory.items()]
        verdict = "fits" if self.fits else "does NOT fit"
        lines += [
            f"{'in all, at the peak of a rank':34}{self.total / 1e9:10.2f} GB of {self.available / 1e9:.2f}: {verdict}",
            "",
            f"{self.facts['parameters']:,.0f} parameters, {self.facts['trained']:,.0f} learn",
            f"a batch: {_duration(self.step_s)} ({_duration(self.compute_s)} computing, {_duration(self.network_s)} on "
            "the network, side by side)",
            f"{self.steps:,.0f} batches, {self.tokens:,.0f} tokens: {_duration(self.steps * self.step_s)}, "
            f"{self.tokens / (self.steps * self.step_s):,.0f} tokens/s",
        ]
        size, number = self.facts["checkpoint_bytes"], self.facts["checkpoints"]
        times = "all of them stay" if number < 0 else f"up to {number:.0f} at a time"
        lines.append(f"a checkpoint: {size / 1e9:,.3g} GB on disk, {times}")
        if self.cost is not None:
            lines.append(f"cost: {self.cost:,.0f}")
        return "\n".join(lines)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def estimate_job(config: Config, cluster: Cluster, length: int | None = None) -> Estimate:
    """Estimate a job from its config; the model's config is read, and the data's sample length if ``length`` is None.

    Raises:
        UserError: the model or the data can't be read, or the job is impossible on this number of ranks.
    """
    check_config(config)
    if length is None:
        length = PreparedData(config.data.path, config.data.cache).manifest.sequence_length
    if config.model.path is not None:
        return estimate(config, load_model_config(config.model.path), length, cluster)
    tokenizer = load_tokenizer(config.model.tokenizer or Path(config.data.path) / "tokenizer")
    model = config_from_fields(config.model.config or {}, tokenizer)
    if config.model.richer_heads is not None:
        model = with_richer_heads(model, config.model.richer_heads)
    return estimate(config, model, length, cluster)


def check_fits(config: Config, model: PretrainedConfig, length: int) -> None:
    """Refuse a job that does not fit into the free memory of this machine, before it starts.

    Args:
        config: config of the job.
        model: Hugging Face config of the model that trains.
        length: number of tokens of a sample.

    Raises:
        UserError: by the estimate, the job needs more memory than a rank has.
    """
    cluster = cluster_here(config)
    free = cluster.memory
    found = estimate(config, model, length, cluster)
    if found.fits or config.train.microbatch_size == "auto":
        return
    largest = sorted(found.memory.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in largest)
    raise UserError(
        f"the job takes about {found.total / 1e9:.2f} GB on every rank and {free / 1e9:.2f} GB are free ({named}): "
        f"take {HELP_WITH_MEMORY}, or train.check_memory=false to start it all the same; `llmprune estimate` shows "
        "what each of them takes"
    )


def cluster_here(config: Config) -> Cluster:
    """This job's ranks with the memory that is free now, as a cluster."""
    gc.collect()  # frees memory of an earlier job in this process
    ranks, here = dist.get_world_size(), dist.get_local_world_size()
    if get_device(config.train.device).name == "gpu":
        torch.cuda.empty_cache()
        return Cluster(ranks, torch.cuda.mem_get_info()[0], here, device="cuda")
    return Cluster(ranks, psutil.virtual_memory().available / here, here, device="cpu")


def estimate(config: Config, model: PretrainedConfig, length: int, cluster: Cluster) -> Estimate:
    """Estimate memory, time and cost of a job.

    Args:
        config: config of the job.
        model: Hugging Face config of the model that trains.
        length: number of tokens of a sample.
        cluster: hardware that the job runs on.

    Raises:
        UserError: the job is impossible on this number of ranks.
    """
    cluster.check()
    train, ranks = config.train, cluster.gpus
    fill_in(config, parameters=count_parameters(model), length=length)
    batch = config.samples_per_step
    if batch % ranks:
        raise UserError(f"train.global_batch_size {batch} is no multiple of {ranks} ranks")
    per_rank, micro = samples_of(config, ranks)
    sizes = JobSizes.of(config, model)
    memory = memory_of(config, model, sizes, length=length, ranks=ranks, device=cluster.device)
    flops = _flops(config, model, length, sizes) * batch
    compute = flops / (cluster.flops * cluster.utilisation * ranks)
    network = _network(config, cluster, sizes, math.ceil(per_rank / micro))
    step = max(compute, network)
    tokens_of_batch = batch * length
    duration = Time.from_timestring(train.duration)
    steps = {
        TimeUnit.BATCH: duration.value,
        TimeUnit.SAMPLE: duration.value / batch,
        TimeUnit.TOKEN: duration.value / tokens_of_batch,
    }[duration.unit]
    hours = steps * step * ranks / 3600
    return Estimate(
        memory,
        cluster.memory,
        step,
        compute,
        network,
        steps,
        steps * tokens_of_batch,
        None if cluster.price is None else hours * cluster.price,
        {
            "parameters": sizes.parameters,
            "trained": sizes.trained,
            "flops_of_batch": flops,
            "gpu_hours": hours,
            "checkpoint_bytes": checkpoint_bytes(config, sizes),
            "checkpoints": -1 if config.checkpoint.keep == -1 else config.checkpoint.keep + 1,
        },
    )


def _flops(config: Config, model: PretrainedConfig, length: int, sizes: JobSizes) -> int:
    """FLOPs of the training step of one sample, with the recomputation of activation checkpointing."""
    learned, needs = sizes.learned, sizes.needs
    found = step_flops(model, length, learned) if needs.flops is None else needs.flops(length, learned.own)
    if config.train.activation_checkpointing:
        found += macs(model, length, blocks=sizes.reached, logits=0).forward
    if needs.teaching is not None and needs.teaching.model is not None:
        found += macs(needs.teaching.model, length).forward
    return found


def _network(config: Config, cluster: Cluster, sizes: JobSizes, microbatches: int) -> float:
    """Seconds per batch for the data that a rank sends and receives."""
    ranks = cluster.gpus
    if ranks == 1:
        return 0.0
    itemsize, products = DTYPES[config.model.dtype].itemsize, products_of(config, cluster.device).itemsize

    def seconds(size: float, group: int, within: bool) -> float:
        return size * (group - 1) / group / (cluster.bandwidth_within if within else cluster.bandwidth)

    one_node = ranks <= cluster.per_node
    if config.sharding is None:
        return 2 * seconds(sizes.trained * itemsize, ranks, one_node)
    group = ranks // config.sharding.replicas
    gathers = 2 if config.sharding.reshard_after_forward else 1
    inside = group <= cluster.per_node
    travels = gathers * sizes.parameters * products + sizes.trained * FLOAT
    sharded = microbatches * seconds(travels, group, inside)
    if (teaching := sizes.needs.teaching) is not None:
        other = teaching.parameters * teaching.itemsize(cluster.device)
        sharded += microbatches * seconds(other, group, inside)
    if config.sharding.replicas > 1:
        sharded += 2 * seconds(sizes.trained * FLOAT / group, config.sharding.replicas, one_node)
    return sharded
