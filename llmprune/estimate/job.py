"""What a training job will take: memory of every rank, time, cost. Known before anything is loaded."""

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

from llmprune.config.schema import Config
from llmprune.config.static_checks import check_config
from llmprune.data.prepared import PreparedData
from llmprune.estimate.memory import memory_of, samples_of
from llmprune.estimate.needs import FLOAT, JobSizes, checkpoint_bytes, products_of
from llmprune.models.flops import macs, step_flops
from llmprune.models.loading import config_from_fields, load_model_config, load_tokenizer
from llmprune.models.own_model_types import with_richer_heads
from llmprune.models.placement import DTYPES
from llmprune.utils.errors import UserError


@dataclass(frozen=True)
class Cluster:
    """What the job runs on.

    Attributes:
        gpus: ranks in all.
        per_node: of them on a node.
        memory: bytes of each.
        flops: of each at its best, in the format of the products, per second.
        utilisation: share of them that training reaches.
        bandwidth: bytes per second between a GPU and those of other nodes.
        bandwidth_within: the same within a node.
        price: of a GPU for an hour.
        device: cuda or cpu.
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
        """Raise ``UserError`` for numbers that are none."""
        for name in ("gpus", "memory", "per_node", "flops", "utilisation", "bandwidth", "bandwidth_within"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be positive")


@dataclass(frozen=True)
class Estimate:
    """What a job takes.

    Attributes:
        memory: bytes of every rank at the peak, by what holds them.
        available: bytes that a rank has.
        step_s: seconds of a batch.
        compute_s: of them, what the operations take at the assumed utilisation.
        network_s: what has to travel takes so long; it overlaps with computing.
        steps: batches of the job.
        tokens: that it learns from.
        cost: at the price of a GPU; None without one.
        facts: further numbers: parameters, those that learn, operations of a batch, bytes of a checkpoint and how many
            there are at a time (-1: all stay).
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
        """Bytes of a rank at its peak."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.total <= self.available

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
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
            f"{self.steps:,.0f} batches, {self.tokens / 1e9:,.3g} B tokens: {_duration(self.steps * self.step_s)}, "
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
    """What a job takes whose model, and data unless ``length`` says how long samples are, can be looked at.

    Raises:
        UserError: they can't, or the job is impossible on so many ranks.
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
    """Refuse a job that does not fit where it is about to start.

    Args:
        config: of the job.
        model: of the model that trains.
        length: tokens of a sample.

    Raises:
        UserError: by the estimate it needs more memory than a rank has.
    """
    gc.collect()  # what an earlier job of this process has left
    ranks, here = dist.get_world_size(), dist.get_local_world_size()
    if get_device(config.train.device).name == "gpu":
        torch.cuda.empty_cache()
        free, device = torch.cuda.mem_get_info()[0], "cuda"
    else:
        free, device = psutil.virtual_memory().available / here, "cpu"
    found = estimate(config, model, length, Cluster(ranks, free, here, device=device))
    if found.fits or config.train.microbatch_size == "auto":
        return
    largest = sorted(found.memory.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in largest)
    raise UserError(
        f"the job takes about {found.total / 1e9:.2f} GB on every rank and {free / 1e9:.2f} GB are free ({named}): "
        "take more ranks with sharding={}, a smaller train.microbatch_size, train.activation_checkpointing=true, or "
        "train.check_memory=false to start it all the same; `llmprune estimate` shows what helps"
    )


def estimate(config: Config, model: PretrainedConfig, length: int, cluster: Cluster) -> Estimate:
    """What a job takes.

    Args:
        config: of the job.
        model: of the model that trains.
        length: tokens of a sample.
        cluster: what it runs on.

    Raises:
        UserError: the job is impossible on so many ranks.
    """
    cluster.check()
    train, ranks = config.train, cluster.gpus
    if train.global_batch_size < 1 or train.global_batch_size % ranks:
        raise UserError(f"train.global_batch_size {train.global_batch_size} is no multiple of {ranks} ranks")
    per_rank, micro = samples_of(config, ranks)
    sizes = JobSizes.of(config, model)
    memory = memory_of(config, model, sizes, length=length, ranks=ranks, device=cluster.device)
    flops = _flops(config, model, length, sizes) * train.global_batch_size
    compute = flops / (cluster.flops * cluster.utilisation * ranks)
    network = _network(config, cluster, sizes, math.ceil(per_rank / micro))
    step = max(compute, network)
    tokens_of_batch = train.global_batch_size * length
    duration = Time.from_timestring(train.duration)
    steps = {
        TimeUnit.BATCH: duration.value,
        TimeUnit.SAMPLE: duration.value / train.global_batch_size,
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
    """Operations of a sample's training step, and of what activation checkpointing computes again."""
    learned, needs = sizes.learned, sizes.needs
    found = step_flops(model, length, learned) if needs.flops is None else needs.flops(length, learned.own)
    if config.train.activation_checkpointing:
        found += macs(model, length, blocks=sizes.reached, logits=0).forward
    if needs.teaching is not None and needs.teaching.model is not None:
        found += macs(needs.teaching.model, length).forward
    return found


def _network(config: Config, cluster: Cluster, sizes: JobSizes, microbatches: int) -> float:
    """Seconds that what a rank sends and receives in a batch takes."""
    ranks = cluster.gpus
    if ranks == 1:
        return 0.0
    itemsize, products = DTYPES[config.model.dtype].itemsize, products_of(config).itemsize

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
