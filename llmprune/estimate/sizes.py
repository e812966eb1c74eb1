"""How many parameters a training job has, which of them learn, and the bytes of each."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from llmprune.config.schema import Config
from llmprune.config.sections import sections_of
from llmprune.models.families import Role, family_of
from llmprune.models.flops import Learned, learned_of
from llmprune.models.loading import load_model_config
from llmprune.models.placement import DTYPES, dtype_for_inference
from llmprune.pruning.replacements.settings import BlockReplacementConfig
from llmprune.recovery.distillation import DistillationConfig
from llmprune.recovery.lora import LoRAConfig

FLOAT = 4  # bytes
MOMENTS = {"decoupled_adamw": 2, "adamw": 2, "decoupled_lion": 1}  # of every parameter that learns
MOST_MOMENTS = 2  # of an optimiser that another package brings


@dataclass(frozen=True)
class Learning:
    """What learns in a job.

    Attributes:
        names: of the model's own parameters.
        added: how many learn beside the model's.
        gates: and multipliers.
        lowest: the first block that gradients pass through; None = as follows from the names.
    """

    names: set[str]
    added: int = 0
    gates: int = 0
    lowest: int | None = None


@dataclass(frozen=True)
class JobSizes:
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
        learned: what learns, as far as operations depend on it.
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
    learned: Learned

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
        learning = Learning(set(sizes))
        for section in sections_of(config):
            learning = section.learning(section.own, built, learning)
        names, lowest = learning.names, learning.lowest
        trained = learning.added + sum(sizes[name] for name in names)
        own = learned_of(model, {name: sizes[name] for name in names})
        reached = own.reached if lowest is None else shape.layers - max(lowest, 0)
        distillation = config.section(DistillationConfig)
        teacher = teacher_outside = 0
        if distillation is not None and distillation.teacher is not None:
            with torch.device("meta"):
                other = AutoModelForCausalLM.from_config(load_model_config(distillation.teacher))
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
            learning.gates,
            teacher,
            teacher_outside,
            model.vocab_size,
            shape.hidden,
            shape.intermediate,
            f"{output}.weight" in names,
            shape.layers,
            Learned(own.own, learning.added, reached),
        )


def adds(config: Config) -> bool:
    """Whether what learns is added to the model, in float32."""
    return config.section(LoRAConfig) is not None or config.section(BlockReplacementConfig) is not None


def held_by(config: Config) -> int:
    """Bytes of a number that learns."""
    return FLOAT if adds(config) else DTYPES[config.model.dtype].itemsize


def autocast_of(config: Config) -> torch.dtype | None:
    """The format of matrix products, if it is not that of the weights."""
    return torch.bfloat16 if config.train.precision == "amp_bf16" else None


def products_of(config: Config) -> torch.dtype:
    """The format of matrix products; FSDP2 gathers shards in that of ``train.precision``, whatever theirs is."""
    stored = DTYPES[config.model.dtype] if config.sharding is None else torch.float32
    return autocast_of(config) or stored


def teacher_itemsize(config: Config, device: str) -> int:
    """Bytes of a number of the teacher on a device, cuda or cpu."""
    distillation = config.section(DistillationConfig)
    assert distillation is not None
    return dtype_for_inference(distillation.dtype, on_gpu=device == "cuda").itemsize


def checkpoint_bytes(config: Config, sizes: JobSizes) -> float:
    """Bytes of a checkpoint: weights and moments."""
    learning = sizes.trained * held_by(config)
    found = sizes.parameters * DTYPES[config.model.dtype].itemsize + learning * MOMENTS.get(
        config.optimizer.name, MOST_MOMENTS
    )
    return found + learning if adds(config) else found
