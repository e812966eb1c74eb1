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
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmprune.checks import check_words, config_from_fields
from llmprune.config import Config
from llmprune.data.prepared import PreparedData
from llmprune.errors import UserError
from llmprune.families import EMBEDDINGS, Role, family_of
from llmprune.gates.gate_set import GateSet
from llmprune.gates.settings import make_goal
from llmprune.measurement.activations import Kept, kept_by
from llmprune.measurement.flops import macs
from llmprune.models.loading import load_config, load_tokenizer
from llmprune.models.parts import parameter_names_of
from llmprune.models.placement import DTYPES
from llmprune.models.richer import with_richer_heads
from llmprune.models.vocabulary import CHUNKS, LEAST
from llmprune.recovery.lora import LoRAConfig, add_adapters
from llmprune.replacements.settings import BlockReplacementConfig
from llmprune.replacements.span import Span
from llmprune.replacements.stand_ins import STAND_INS, Site
from llmprune.replacing import given_span

FRAGMENTATION = 0.06  # of all that is allocated: what the allocator can't use
CONTEXT = {"cuda": 1.0e9, "cpu": 0.0}  # bytes of libraries and their buffers on the device
FLOAT = 4  # bytes
MOMENTS = {"decoupled_adamw": 2, "adamw": 2, "decoupled_lion": 1}  # of every parameter that learns
BROADCAST = 250 * 2**20  # bytes that PyTorch sends at a time when ranks get the same weights
FOUR_BITS = 0.52  # bytes of a number in nf4 with its share of the scales


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
    check_words(config)
    if length is None:
        length = PreparedData(config.data.path, config.data.cache).manifest.sequence_length
    if config.model.path is not None:
        return estimate(config, load_config(config.model.path), length, cluster)
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
    per_rank = train.global_batch_size // ranks
    micro = 1 if train.microbatch_size == "auto" else min(int(train.microbatch_size), per_rank)
    sizes = _Sizes.of(config, model)
    memory = _memory(config, model, length, cluster, sizes, micro, per_rank)
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
            "checkpoint_bytes": _checkpoint(config, sizes),
            "checkpoints": -1 if config.checkpoint.keep == -1 else config.checkpoint.keep + 1,
        },
    )


@dataclass(frozen=True)
class _Sizes:
    """Numbers of parameters.

    Attributes:
        parameters: in all.
        trained: that learn.
        block: of a block.
        outside: of embedding, final norm and output layer.
        matrix: of the largest one.
        gates: and multipliers.
        teacher: of another model; 0 = none.
        teacher_outside: of its embedding, final norm and output layer.
        vocabulary: tokens.
        hidden: dimensions.
        intermediate: channels of an MLP.
        output_trained: whether the output layer's weight learns.
        layers: blocks.
        reached: of them, those that gradients pass through: from the lowest that learns on.
    """

    parameters: int
    trained: int
    block: int
    outside: int
    matrix: int
    gates: int
    teacher: int
    teacher_outside: int
    vocabulary: int
    hidden: int
    intermediate: int
    output_trained: bool
    layers: int
    reached: int

    @classmethod
    def of(cls, config: Config, model: PretrainedConfig) -> "_Sizes":
        family = family_of(model)
        shape = family.shape(model)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(model)
        sizes = {name: parameter.numel() for name, parameter in built.named_parameters()}
        outside = sum(n for name, n in sizes.items() if family.locate(name).block is None)
        names = set(sizes)
        if config.trainable is not None:
            phases = [config.trainable.parts, *config.trainable.later.values()]
            names = {name for parts in phases for name in parameter_names_of(built, parts)}
        trained = sum(sizes[name] for name in names)
        located = [family.locate(name) for name in names]
        lowest = min(-1 if p.role in EMBEDDINGS else shape.layers if p.block is None else p.block for p in located)
        if config.lora is not None:
            names, lowest = set(), 0
            with torch.device("meta"):
                trained = sum(p.numel() for p in add_adapters(built, config.lora, 0))
        if config.block_replacement is not None:
            names, trained, lowest = _replaced(built, config.block_replacement, given_span(config), shape.layers)
            trained += sum(sizes[name] for name in names)
        gates = 0
        if config.l0_pruning is not None:
            gates = sum(p.numel() for p in GateSet(shape, make_goal(model, config.l0_pruning)).parameters())
        teacher = teacher_outside = 0
        if config.distillation is not None and config.distillation.teacher is not None:
            with torch.device("meta"):
                other = AutoModelForCausalLM.from_config(load_config(config.distillation.teacher))
            teacher = sum(p.numel() for p in other.parameters())
            locate = family_of(other.config).locate
            teacher_outside = sum(p.numel() for name, p in other.named_parameters() if locate(name).block is None)
        output = family.outer_name(Role.EMBEDDING if family.tied(model) else Role.OUTPUT)
        return cls(
            sum(sizes.values()),
            trained,
            (sum(sizes.values()) - outside) // shape.layers,
            outside,
            max(sizes.values()),
            gates,
            teacher,
            teacher_outside,
            model.vocab_size,
            shape.hidden,
            shape.intermediate,
            f"{output}.weight" in names,
            shape.layers,
            shape.layers - max(lowest, 0),
        )


def _replaced(
    built: PreTrainedModel, settings: BlockReplacementConfig, span: Span | None, layers: int
) -> tuple[set[str], int, int]:
    """What trains beside the stand-in, the stand-in's parameters, and the first block that gradients pass through."""
    if span is None:  # any of that length but the first, at which not every kind can begin
        assert settings.length is not None
        span = Span(max(layers - settings.length, 0), settings.length)
    with torch.device("meta"):
        network = STAND_INS.get(settings.kind)(Site(built, span, 0), settings)
    behind = span.end if {"lm", "kl"} & set(settings.weights) else layers
    stands = settings.blocks if settings.kind == "blocks" else 1
    trained = sum(p.numel() for p in network.parameters())
    return set(parameter_names_of(built, settings.also)), trained, max(behind - stands, 0)


def _adds(config: Config) -> bool:
    """Whether what learns is added to the model, in float32."""
    return config.lora is not None or config.block_replacement is not None


def _held(config: Config) -> int:
    """Bytes of a number that learns."""
    return FLOAT if _adds(config) else DTYPES[config.model.dtype].itemsize


def _autocast(config: Config) -> torch.dtype | None:
    return {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}.get(config.train.precision)


def _memory(
    config: Config, model: PretrainedConfig, length: int, cluster: Cluster, sizes: _Sizes, micro: int, per_rank: int
) -> dict[str, float]:
    """Bytes by what holds them, at the peak."""
    dtype, autocast = DTYPES[config.model.dtype], _autocast(config)
    held = _held(config)
    shards = 1 if config.sharding is None else cluster.gpus // config.sharding.replicas
    moments = MOMENTS[config.optimizer.name]
    weights = sizes.parameters * dtype.itemsize / shards
    if config.lora is not None and config.lora.quantize is not None:
        weights = sizes.outside * dtype.itemsize + (sizes.parameters - sizes.outside) * FOUR_BITS
    if _adds(config):
        weights += sizes.trained * held
    gradients = sizes.trained * held / shards
    products = _products(config)
    in_states = products if config.sharding is not None else dtype  # as FSDP2 gathers them
    lora = config.lora
    kept = kept_by(
        model,
        samples=micro,
        length=length,
        dtype=in_states,
        autocast=autocast,
        attention=config.model.attention,
        prepare=None if lora is None else lambda built: _adapt(built, lora, cluster.device),
    )
    away = gradients if per_rank <= micro else 0.0  # they come as activations go
    stages = _stages(config, model, sizes, kept, micro * length, cluster.device)
    totals = [(stage.working - (0.0 if stage.late else away), stage.gathered) for stage in stages]
    working, gathered = max(totals, key=sum)
    found = {
        "weights": weights,
        "gradients": gradients,
        f"moments of {config.optimizer.name}": sizes.trained * held * moments / shards,
    }
    if sizes.teacher and config.distillation is not None:
        found["teacher"] = sizes.teacher * DTYPES[config.distillation.dtype].itemsize / shards
    if sizes.gates:
        found["gates"] = sizes.gates * FLOAT * 4 + sizes.matrix * FLOAT
    if config.sharding is not None:
        found["gathered shards"] = gathered
        if config.sharding.replicas > 1 and dtype.itemsize < FLOAT:
            found["sums of groups"] = sizes.trained * FLOAT / shards
    elif cluster.gpus > 1:
        found["gradients on their way"] = sizes.trained * held
    if autocast is not None and config.sharding is None:
        working += (sizes.parameters - sizes.outside) * autocast.itemsize  # weights cast for a whole pass
    found["activations and logits"] = max(working, 0.0)
    if config.sharding is None and cluster.gpus > 1:  # before anything trains, all ranks get the weights of the first
        more = weights + min(weights, BROADCAST) - sum(found.values())
        if more > 0:
            found["weights on their way"] = more
    found["lost to fragmentation, and libraries"] = FRAGMENTATION * sum(found.values()) + CONTEXT[cluster.device]
    return found


def _adapt(model: PreTrainedModel, config: LoRAConfig, device: str) -> None:
    """Add adapters that keep what they drop as they do on the device: GPUs note it in a byte."""
    add_adapters(model, config, 0)
    for module in model.modules():
        if device == "cuda" and isinstance(module, nn.Dropout):
            module.forward = lambda x, p=module.p: torch.native_dropout(x, p, True)[0]  # type: ignore[method-assign, misc]


@dataclass(frozen=True)
class _Stage:
    """A moment of a pass.

    Attributes:
        working: bytes of activations, logits and gradients on their way.
        gathered: bytes of what FSDP2 holds for it.
        late: whether all gradients are there by then.
    """

    working: float
    gathered: float
    late: bool = False


def _products(config: Config) -> torch.dtype:
    """The format of matrix products; FSDP2 gathers shards in that of ``train.precision``, whatever theirs is."""
    stored = DTYPES[config.model.dtype] if config.sharding is None else torch.float32
    return _autocast(config) or stored


def _stages(
    config: Config, model: PretrainedConfig, sizes: _Sizes, kept: Kept, tokens: int, device: str
) -> list[_Stage]:
    """The moments that may be the peak of a pass: at the output layer, in the last blocks, in the first, at its end."""
    products, autocast, sharding = _products(config).itemsize, _autocast(config), config.sharding
    checkpointed, distillation = config.train.activation_checkpointing, config.distillation
    matrix = sizes.vocabulary * sizes.hidden
    of_output = matrix if sizes.output_trained else 0  # its gradient is made beside the losses, in float32
    standing = kept.outside + (sizes.reached * kept.states if checkpointed else max(sizes.reached, 1) * kept.block)
    if distillation is not None and distillation.compares_states:  # the teacher's states, and their differences
        pairs = sizes.layers if distillation.blocks is None else len(distillation.blocks)
        standing += pairs * tokens * sizes.hidden * (DTYPES[distillation.dtype].itemsize + FLOAT)
    at_output = standing + _logits(config, model, sizes, tokens, device) + of_output * FLOAT
    if products < FLOAT:
        at_output += of_output * products  # a chunk's share
        if autocast is not None and sharding is None:
            at_output += matrix * products  # the weight itself
    block = kept.block + (3 * tokens * sizes.intermediate * products if checkpointed else 0)
    in_blocks = standing + of_output * (products if sharding is not None else FLOAT) + (block if checkpointed else 0)
    outside = teacher = blocks = leaving = 0.0
    if sharding is not None:
        in_use = min(2, max(sizes.reached, 1))  # the one that is gone through, and the next, on its way
        outside, blocks = sizes.outside * products, in_use * sizes.block * products
        if not sharding.reshard_after_forward:
            outside, blocks = sizes.parameters * products, 0
        # A block's whole gradient, and that of the one before it, which is on its way to all ranks in float32.
        blocks += min(sizes.trained, sizes.block) * products
        blocks += min(max(sizes.trained - sizes.block, 0), sizes.block) * FLOAT
        leaving = min(sizes.trained, sizes.outside) * (products + FLOAT)
        if sizes.teacher and distillation is not None:
            teacher = sizes.teacher_outside * DTYPES[distillation.dtype].itemsize
    return [
        _Stage(at_output, outside + teacher),
        _Stage(in_blocks, outside + blocks),
        _Stage(kept.outside + block, outside + blocks, late=True),
        _Stage(leaving, outside, late=True),
    ]


def _logits(config: Config, model: PretrainedConfig, sizes: _Sizes, tokens: int, device: str) -> float:
    """Bytes of a chunk's logits as they come, in float32, their exponentials, their gradient; of states' gradient."""
    products, replacement = _products(config).itemsize, config.block_replacement
    chunk = min(max(CHUNKS[device] // sizes.vocabulary, LEAST), tokens) * sizes.vocabulary
    softcap = family_of(model).softcap
    capped = 2 * FLOAT if softcap is not None and getattr(model, softcap) is not None else 0
    if replacement is not None and not {"lm", "kl"} & set(replacement.weights):  # only evaluations need them
        evaluates = Time.from_timestring(config.train.eval_interval).value > 0
        return chunk * (max(products + FLOAT, 2 * FLOAT) + capped) if evaluates else 0.0
    compared = config.distillation is not None or (replacement is not None and "kl" in replacement.weights)
    each = products + 7 * FLOAT if compared else 2 * products + 2 * FLOAT
    return chunk * (each + capped) + tokens * sizes.hidden * products * 2


def _checkpoint(config: Config, sizes: _Sizes) -> float:
    """Bytes of a checkpoint: weights and moments."""
    learning = sizes.trained * _held(config)
    found = sizes.parameters * DTYPES[config.model.dtype].itemsize + learning * MOMENTS[config.optimizer.name]
    return found + learning if _adds(config) else found


def _flops(config: Config, model: PretrainedConfig, length: int, sizes: _Sizes) -> float:
    """Operations of a sample's training step."""
    forward = 2 * macs(model, length).total
    share = max(sizes.reached, 1) / sizes.layers
    backward = share * forward + 2 * length * sizes.trained  # of what goes in, and of what learns
    again = share * forward if config.train.activation_checkpointing else 0
    total = float(forward + backward + again)
    if config.distillation is not None:
        total += 2 * sizes.teacher * length if sizes.teacher else forward
    return total


def _network(config: Config, cluster: Cluster, sizes: _Sizes, microbatches: int) -> float:
    """Seconds that what a rank sends and receives in a batch takes."""
    ranks = cluster.gpus
    if ranks == 1:
        return 0.0
    itemsize, products = DTYPES[config.model.dtype].itemsize, _products(config).itemsize

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
    if sizes.teacher and config.distillation is not None:
        other = sizes.teacher * DTYPES[config.distillation.dtype].itemsize
        sharded += microbatches * seconds(other, group, inside)
    if config.sharding.replicas > 1:
        sharded += 2 * seconds(sizes.trained * FLOAT / group, config.sharding.replicas, one_node)
    return sharded
