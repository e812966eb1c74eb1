"""Memory of a rank at the peak of a training job."""

from dataclasses import dataclass

import torch
from composer.core import Time
from transformers import PretrainedConfig

from llmprune.config.schema import Config
from llmprune.estimate.activations import Kept, kept_by
from llmprune.estimate.needs import (
    FLOAT,
    MOMENTS,
    MOST_MOMENTS,
    JobSizes,
    autocast_of,
    learning_bytes,
    products_of,
)
from llmprune.models.families import family_of
from llmprune.models.number_formats import DTYPES
from llmprune.models.vocabulary import CHUNKS, LEAST

FRAGMENTATION = 0.06  # memory that the allocator can't use, as a share of all allocated memory
CONTEXT = {"cuda": 1.0e9, "cpu": 0.0}  # bytes of libraries and their buffers on the device
BROADCAST = 250 * 2**20  # bytes that PyTorch sends at a time when it copies weights to all ranks


def memory_of(
    config: Config, model: PretrainedConfig, sizes: JobSizes, *, length: int, ranks: int, device: str
) -> dict[str, float]:
    """Bytes of a rank at the peak, by purpose.

    Args:
        config: config of the job.
        model: Hugging Face config of the model that trains.
        sizes: parameter counts of the job.
        length: number of tokens of a sample.
        ranks: number of ranks in total.
        device: device type, "cuda" or "cpu".
    """
    dtype, teaching, learning = DTYPES[config.model.dtype], sizes.needs.teaching, learning_bytes(config, sizes)
    shards = 1 if config.sharding is None else ranks // config.sharding.replicas
    moments = MOMENTS.get(config.optimizer.name, MOST_MOMENTS)
    weights, gradients = _weights(config, sizes, shards, device), learning / shards
    working, gathered = _at_peak(config, model, sizes, gradients, length=length, ranks=ranks, device=device)
    found = {
        "weights": weights,
        "gradients": gradients,
        f"moments of {config.optimizer.name}": learning * moments / shards,
    }
    if teaching is not None and teaching.parameters:
        found["teacher"] = teaching.parameters * teaching.itemsize(device) / shards
    if sizes.needs.gates:
        found["gates"] = sizes.needs.gates * FLOAT * 4 + sizes.matrix * FLOAT
    if config.sharding is not None:
        found["gathered shards"] = gathered
        if config.sharding.replicas > 1 and dtype.itemsize < FLOAT:
            found["sums of groups"] = sizes.trained * FLOAT / shards
    elif ranks > 1:
        found["gradients on their way"] = learning
    found["activations and logits"] = max(working, 0.0)
    if config.sharding is None and ranks > 1:  # before training, all ranks get the weights of rank 0
        more = weights + min(weights, BROADCAST) - sum(found.values())
        if more > 0:
            found["weights on their way"] = more
    found["lost to fragmentation, and libraries"] = FRAGMENTATION * sum(found.values()) + CONTEXT[device]
    return found


def _held_as_multiplied(config: Config, sizes: JobSizes, device: str) -> torch.dtype | None:
    """The dtype of matrix products if the blocks' matrices are held in it instead of ``model.dtype``."""
    held = sizes.needs.frozen_as_multiplied and config.sharding is None
    return autocast_of(config, device) if held else None


def _weights(config: Config, sizes: JobSizes, shards: int, device: str) -> float:
    """Bytes of the weights of a rank, with the weights that sections add."""
    itemsize, block_itemsize = DTYPES[config.model.dtype].itemsize, sizes.needs.block_itemsize
    if (held := _held_as_multiplied(config, sizes, device)) is not None:
        block_itemsize = held.itemsize
    weights = sizes.parameters * itemsize / shards
    if block_itemsize is not None:
        weights = sizes.outside * itemsize + (sizes.parameters - sizes.outside) * block_itemsize
    return weights + sizes.needs.added * FLOAT


def _at_peak(
    config: Config,
    model: PretrainedConfig,
    sizes: JobSizes,
    gradients: float,
    *,
    length: int,
    ranks: int,
    device: str,
) -> tuple[float, float]:
    """Bytes of temporary tensors of a pass, and bytes gathered by FSDP2, at the moment when their sum is largest.

    Args:
        config: config of the job.
        model: Hugging Face config of the model that trains.
        sizes: parameter counts of the job.
        gradients: bytes of all gradients of a rank, which are counted separately.
        length: number of tokens of a sample.
        ranks: number of ranks in total.
        device: device type, "cuda" or "cpu".
    """
    per_rank, micro = samples_of(config, ranks)
    autocast, adding = autocast_of(config, device), sizes.needs.added_to
    kept = kept_by(
        model,
        samples=micro,
        length=length,
        dtype=DTYPES[config.model.dtype] if config.sharding is None else products_of(config, device),  # of FSDP2
        autocast=autocast,
        attention=config.model.attention,
        prepare=None if adding is None else lambda built: adding(built, device),
    )
    away = gradients if per_rank <= micro else 0.0  # with one microbatch, gradients grow while activations are freed
    stages = _stages(config, model, sizes, kept, micro * length, device)
    totals = [(stage.working - (0.0 if stage.late else away), stage.gathered) for stage in stages]
    working, gathered = max(totals, key=sum)
    if autocast is not None and config.sharding is None and _held_as_multiplied(config, sizes, device) is None:
        working += (sizes.parameters - sizes.outside) * autocast.itemsize  # cast weights, cached for a whole pass
    return working, gathered


def samples_of(config: Config, ranks: int) -> tuple[int, int]:
    """The number of samples of a batch on each rank, and the number of samples of a microbatch."""
    per_rank = config.samples_per_step // ranks
    micro = config.train.microbatch_size
    return per_rank, 1 if micro == "auto" else min(int(micro), per_rank)


@dataclass(frozen=True)
class _Stage:
    """A moment of a training pass.

    Attributes:
        working: bytes of activations, logits and temporary gradients.
        gathered: bytes of the weights that FSDP2 has gathered, and of the gradients that it reduces.
        late: whether all gradients exist at this moment.
    """

    working: float
    gathered: float
    late: bool = False


def _stages(
    config: Config, model: PretrainedConfig, sizes: JobSizes, kept: Kept, tokens: int, device: str
) -> list[_Stage]:
    """The moments at which a pass may have its peak: output layer, last blocks, first blocks, end of the pass."""
    products, autocast, sharding = products_of(config, device).itemsize, autocast_of(config, device), config.sharding
    checkpointed, teaching = config.train.activation_checkpointing, sizes.needs.teaching
    matrix = sizes.vocabulary * sizes.hidden
    of_output = matrix if sizes.output_trained else 0  # its gradient is computed with the losses, in float32
    standing = kept.outside + (sizes.reached * kept.states if checkpointed else max(sizes.reached, 1) * kept.block)
    if teaching is not None:  # the teacher's states, and their differences
        standing += teaching.compared_blocks * tokens * sizes.hidden * (teaching.itemsize(device) + FLOAT)
    at_output = standing + _logits(config, model, sizes, tokens, device) + of_output * FLOAT
    if products < FLOAT:
        at_output += of_output * products  # the gradient of one chunk
        if autocast is not None and sharding is None:
            at_output += matrix * products  # the cast copy of the weight
    block = kept.block + (3 * tokens * sizes.intermediate * products if checkpointed else 0)
    in_blocks = standing + of_output * (products if sharding is not None else FLOAT) + (block if checkpointed else 0)
    outside = teacher = blocks = leaving = 0.0
    if sharding is not None:
        in_use = min(2, max(sizes.reached, 1))  # the current block, and the prefetched next block
        outside, blocks = sizes.outside * products, in_use * sizes.block * products
        if not sharding.reshard_after_forward:
            outside, blocks = sizes.parameters * products, 0
        # The complete gradient of a block, and the previous block's gradient, which is being reduced in float32.
        blocks += min(sizes.trained, sizes.block) * products
        blocks += min(max(sizes.trained - sizes.block, 0), sizes.block) * FLOAT
        leaving = min(sizes.trained, sizes.outside) * (products + FLOAT)
        if teaching is not None:
            teacher = teaching.outside * teaching.itemsize(device)
    return [
        _Stage(at_output, outside + teacher),
        _Stage(in_blocks, outside + blocks),
        _Stage(kept.outside + block, outside + blocks, late=True),
        _Stage(leaving, outside, late=True),
    ]


def _logits(config: Config, model: PretrainedConfig, sizes: JobSizes, tokens: int, device: str) -> float:
    """Bytes of a chunk's logits, as computed and in float32, of their exponentials and gradient, and of the states'."""
    products, use = products_of(config, device).itemsize, sizes.needs.logits
    chunk = min(max(CHUNKS[device] // sizes.vocabulary, LEAST), tokens) * sizes.vocabulary
    softcap = family_of(model).softcap
    capped = 2 * FLOAT if softcap is not None and getattr(model, softcap) is not None else 0
    if use == "evaluated":
        evaluates = Time.from_timestring(config.train.eval_interval).value > 0
        return chunk * (max(products + FLOAT, 2 * FLOAT) + capped) if evaluates else 0.0
    each = products + 7 * FLOAT if use == "compared" else 2 * products + 2 * FLOAT
    return chunk * (each + capped) + tokens * sizes.hidden * products * 2
