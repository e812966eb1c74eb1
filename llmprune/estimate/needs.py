"""Numbers of parameters of a training job, the parameters that learn, and bytes of each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmprune.config.schema import Config
from llmprune.config.section_registry import sections_of
from llmprune.models.families import Role, family_of
from llmprune.models.flops import Learned, learned_of
from llmprune.models.number_formats import DTYPES, dtype_for_inference, precision_of

FLOAT = 4  # bytes of a float32 number
MOMENTS = {"decoupled_adamw": 2, "adamw": 2, "decoupled_lion": 1}  # optimizer states per learning parameter
MOST_MOMENTS = 2  # optimizer states per learning parameter, assumed for an optimiser of another package


@dataclass(frozen=True)
class Teaching:
    """Sizes of a teacher.

    Attributes:
        model: Hugging Face config of the model that predicts beside the student; None = its predictions were kept.
        parameters: number of parameters of a teacher in memory beside the student; 0 = no such teacher.
        outside: number of the teacher's parameters in its embedding, final norm and output layer.
        dtype: format of the teacher's weights: float32, bfloat16 or auto.
        compared_blocks: number of blocks whose hidden states are compared.
    """

    model: PretrainedConfig | None
    parameters: int
    outside: int
    dtype: str
    compared_blocks: int

    def itemsize(self, device: str) -> int:
        """Bytes of one of the teacher's weights on a device ("cuda" or "cpu")."""
        return dtype_for_inference(self.dtype, on_gpu=device == "cuda").itemsize


@dataclass(frozen=True)
class Needs:
    """The parameters that learn, and what the sections add to the memory and the FLOPs of plain training.

    Attributes:
        names: names of the model's own parameters that learn.
        added: number of learning parameters that sections add to the model, in float32.
        gates: number of gate parameters and Lagrange multipliers.
        lowest: number of the first block that gradients pass through; None = the lowest block with a name in ``names``.
        block_itemsize: bytes of one weight of a block; None = as in ``model.dtype``.
        frozen_as_multiplied: whether the blocks' matrices are held in the dtype of matrix products, unless they are
            sharded.
        added_to: function that adds the sections' modules to a model, so that their activations are counted; its
            arguments are the model and the device type ("cuda" or "cpu").
        teaching: sizes of the teacher; None = no teacher.
        logits: use of the logits: ``learned`` (the next token), ``compared`` with a teacher's, or ``evaluated`` only.
        flops: function that returns the FLOPs of a sample's training step; its arguments are the sample's length and
            the multiply-accumulate operations per token with the model's own weights that learn; None = the FLOPs of
            the model.
    """

    names: set[str]
    added: int = 0
    gates: int = 0
    lowest: int | None = None
    block_itemsize: float | None = None
    frozen_as_multiplied: bool = False
    added_to: Callable[[PreTrainedModel, str], object] | None = None
    teaching: Teaching | None = None
    logits: Literal["learned", "compared", "evaluated"] = "learned"
    flops: Callable[[int, int], int] | None = None


@dataclass(frozen=True)
class JobSizes:
    """Parameter counts and dimensions of a job's model.

    Attributes:
        parameters: number of all parameters.
        trained: number of parameters that learn, with those that sections add.
        block: number of parameters of a block.
        outside: number of parameters of embedding, final norm and output layer.
        matrix: number of parameters of the largest matrix.
        vocabulary: number of tokens of the vocabulary.
        hidden: number of hidden dimensions.
        intermediate: number of channels of an MLP.
        output_trained: whether the output layer's weight learns.
        layers: number of blocks.
        learned: multiply-accumulate operations of the weights that learn, and number of blocks that gradients reach.
        needs: needs of the job's sections.
    """

    parameters: int
    trained: int
    block: int
    outside: int
    matrix: int
    vocabulary: int
    hidden: int
    intermediate: int
    output_trained: bool
    layers: int
    learned: Learned
    needs: Needs

    @property
    def reached(self) -> int:
        """Number of blocks that gradients pass through, from the lowest block that learns to the last."""
        return self.learned.reached

    @classmethod
    def of(cls, config: Config, model: PretrainedConfig) -> "JobSizes":
        """Count the parameters of a job.

        Args:
            config: config of the job.
            model: Hugging Face config of the model that trains.
        """
        family = family_of(model)
        shape = family.shape(model)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(model)
        sizes = {name: parameter.numel() for name, parameter in built.named_parameters()}
        outside = sum(n for name, n in sizes.items() if family.locate(name).block is None)
        needs = Needs(set(sizes))
        for section in sections_of(config):
            needs = section.needs(section.own, built, needs)
        names, lowest = needs.names, needs.lowest
        trained = needs.added + sum(sizes[name] for name in names)
        own = learned_of(model, {name: sizes[name] for name in names})
        reached = own.reached if lowest is None else shape.layers - max(lowest, 0)
        output = family.outer_name(Role.EMBEDDING if family.tied(model) else Role.OUTPUT)
        return cls(
            sum(sizes.values()),
            trained,
            (sum(sizes.values()) - outside) // shape.layers,
            outside,
            max(sizes.values()),
            model.vocab_size,
            shape.hidden,
            shape.intermediate,
            f"{output}.weight" in names,
            shape.layers,
            Learned(own.own, needs.added, reached),
            needs,
        )


def learning_bytes(config: Config, sizes: JobSizes) -> float:
    """Bytes of all parameters that learn, or of their gradients; in float32 if sections add parameters."""
    return sizes.trained * (FLOAT if sizes.needs.added else DTYPES[config.model.dtype].itemsize)


def autocast_of(config: Config, device: str) -> torch.dtype | None:
    """The dtype of matrix products under autocast on a device ("cuda" or "cpu"); None = the weights' dtype is used."""
    return torch.bfloat16 if precision_of(config.train.precision, on_gpu=device == "cuda") == "amp_bf16" else None


def products_of(config: Config, device: str) -> torch.dtype:
    """The dtype of matrix products; with sharding, FSDP2 gathers weights in the dtype of ``train.precision``."""
    stored = DTYPES[config.model.dtype] if config.sharding is None else torch.float32
    return autocast_of(config, device) or stored


def checkpoint_bytes(config: Config, sizes: JobSizes) -> float:
    """Bytes of a checkpoint: weights and optimizer states."""
    learning, moments = learning_bytes(config, sizes), MOMENTS.get(config.optimizer.name, MOST_MOMENTS)
    found = sizes.parameters * DTYPES[config.model.dtype].itemsize + learning * moments
    return found + learning if sizes.needs.added else found
