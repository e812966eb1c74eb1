"""How many parameters a training job has, which of them learn, and the bytes of each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from llmprune.config.schema import Config
from llmprune.config.section_registry import sections_of
from llmprune.models.families import Role, family_of
from llmprune.models.flops import Learned, learned_of
from llmprune.models.placement import DTYPES, dtype_for_inference

FLOAT = 4  # bytes
MOMENTS = {"decoupled_adamw": 2, "adamw": 2, "decoupled_lion": 1}  # of every parameter that learns
MOST_MOMENTS = 2  # of an optimiser that another package brings


@dataclass(frozen=True)
class Teaching:
    """What learning from a teacher takes.

    Attributes:
        model: the config of the model that predicts beside the student; None = its predictions were kept.
        parameters: of a model that is held beside the student; 0 = none.
        outside: of them, those of its embedding, final norm and output layer.
        dtype: of its weights: float32, bfloat16 or auto.
        compared_blocks: blocks whose states are compared.
    """

    model: PretrainedConfig | None
    parameters: int
    outside: int
    dtype: str
    compared_blocks: int

    def itemsize(self, device: str) -> int:
        """Bytes of a number of the teacher on a device, cuda or cpu."""
        return dtype_for_inference(self.dtype, on_gpu=device == "cuda").itemsize


@dataclass(frozen=True)
class Needs:
    """What a job learns, and what its sections add to the memory and the operations of plain training.

    Attributes:
        names: of the model's own parameters that learn.
        added: how many numbers learn beside the model's, in float32.
        gates: numbers of gates and multipliers.
        lowest: the first block that gradients pass through; None = as follows from the names.
        block_itemsize: bytes of a number of the blocks' weights; None = as ``model.dtype`` says.
        added_to: adds to a model, on a device (cuda or cpu), what its forward pass keeps activations of.
        teaching: what a teacher takes; None = there is none.
        logits: what is done with them: ``learned`` (the next token), ``compared`` with a teacher's, or ``evaluated``
            only.
        flops: operations of a sample's training step, given its length and the multiply-accumulate operations of a
            token with the model's own weights that learn; None = those of the model.
    """

    names: set[str]
    added: int = 0
    gates: int = 0
    lowest: int | None = None
    block_itemsize: float | None = None
    added_to: Callable[[PreTrainedModel, str], object] | None = None
    teaching: Teaching | None = None
    logits: Literal["learned", "compared", "evaluated"] = "learned"
    flops: Callable[[int, int], int] | None = None


@dataclass(frozen=True)
class JobSizes:
    """Numbers of parameters.

    Attributes:
        parameters: in all.
        trained: that learn.
        block: of a block.
        outside: of embedding, final norm and output layer.
        matrix: of the largest one.
        vocabulary: tokens.
        hidden: dimensions.
        intermediate: channels of an MLP.
        output_trained: whether the output layer's weight learns.
        layers: blocks.
        learned: what learns, as far as operations depend on it.
        needs: of the job's sections.
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
        """Blocks that gradients pass through: from the lowest that learns on."""
        return self.learned.reached

    @classmethod
    def of(cls, config: Config, model: PretrainedConfig) -> "JobSizes":
        """Those of a job.

        Args:
            config: of the job.
            model: of the model that trains.
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
    """Bytes of all numbers that learn, or of their gradients: what is added to a model is float32."""
    return sizes.trained * (FLOAT if sizes.needs.added else DTYPES[config.model.dtype].itemsize)


def autocast_of(config: Config) -> torch.dtype | None:
    """The format of matrix products, if it is not that of the weights."""
    return torch.bfloat16 if config.train.precision == "amp_bf16" else None


def products_of(config: Config) -> torch.dtype:
    """The format of matrix products; FSDP2 gathers shards in that of ``train.precision``, whatever theirs is."""
    stored = DTYPES[config.model.dtype] if config.sharding is None else torch.float32
    return autocast_of(config) or stored


def checkpoint_bytes(config: Config, sizes: JobSizes) -> float:
    """Bytes of a checkpoint: weights and moments."""
    learning, moments = learning_bytes(config, sizes), MOMENTS.get(config.optimizer.name, MOST_MOMENTS)
    found = sizes.parameters * DTYPES[config.model.dtype].itemsize + learning * moments
    return found + learning if sizes.needs.added else found
