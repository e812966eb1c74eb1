"""Floating-point operations of forward and backward passes, counted from the config alone.

All other modules use these counts. Products that a causal or a sliding-window mask discards are counted, since dense
kernels compute them and operation counters count them; a token after a cache that contains only a sliding window takes
fewer. Norms, activations and rotations are left out, as usual, and so is the recomputation by activation checkpointing.
In a mixture of experts, the experts that a token passes through are counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedModel

from llmprune.models.families import EMBEDDINGS, Family, Role, family_of, richer_heads_of, skipped_of
from llmprune.models.parameters import plain_name
from llmprune.utils.errors import UserError


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulate operations of a forward pass; costs are in FLOPs, two for each operation.

    Attributes:
        projections: number of operations of the attention's matrices, and of the layers of richer heads.
        attention: number of operations of queries times keys, and of attention weights times values.
        mlp: number of operations of the MLPs' matrices; in a mixture of experts, of the router and of the experts that
            a token passes through.
        output: number of operations of the output layer.
    """

    projections: int
    attention: int
    mlp: int
    output: int

    @property
    def matrices(self) -> int:
        """The operations with weights."""
        return self.projections + self.mlp + self.output

    @property
    def total(self) -> int:
        """All operations."""
        return self.matrices + self.attention

    @property
    def forward(self) -> int:
        """FLOPs of the forward pass."""
        return 2 * self.total

    @property
    def backward(self) -> int:
        """FLOPs of the gradients of all inputs; in the attention, both factors of each product have a gradient."""
        return 2 * (self.matrices + 2 * self.attention)

    @property
    def weight_gradients(self) -> int:
        """FLOPs of the gradients of all weights."""
        return 2 * self.matrices

    @property
    def step(self) -> int:
        """FLOPs of a training step in which all weights learn: three times the forward pass."""
        return self.forward + self.backward + self.weight_gradients


def macs(
    config: PretrainedConfig, tokens: int, past: int = 0, *, logits: int | None = None, blocks: int | None = None
) -> Macs:
    """Count the operations of one sequence's forward pass.

    Args:
        config: config of a supported family.
        tokens: number of tokens that pass through the model together.
        past: number of tokens in the cache.
        logits: number of tokens whose logits are computed; None = all.
        blocks: number of blocks that the tokens pass through; None = all.

    Raises:
        UserError: the architecture is not supported, or has a replacement module.
    """
    if getattr(config, "llmprune_replacement", None) is not None:
        raise UserError("what a replacement module for blocks takes is not counted")
    family = family_of(config)
    shape = family.shape(config)
    layers = shape.layers if blocks is None else blocks
    lacking = {
        name: sum(number >= shape.layers - layers for number in numbers) for name, numbers in skipped_of(config).items()
    }
    attentions, mlps = layers - lacking.get("attention", 0), layers - lacking.get("mlp", 0)
    matrices = family.matrices(config)
    columns = matrices["query"] * shape.heads + matrices["key_value"] * shape.kv_heads
    richer = 0 if richer_heads_of(config) is None else shape.heads * shape.head_dim
    channels, router = matrices["channel"] * shape.intermediate, 0
    if shape.experts is not None and family.chosen_experts is not None:
        channels = channels // shape.experts * getattr(config, family.chosen_experts)
        router = matrices["expert"] * shape.experts
    return Macs(
        projections=tokens * attentions * shape.head_dim * (shape.hidden * columns + richer),
        attention=2 * tokens * (past + tokens) * attentions * shape.heads * shape.head_dim,
        mlp=tokens * mlps * shape.hidden * (channels + router),
        output=(tokens if logits is None else logits) * shape.hidden * config.vocab_size,
    )


@dataclass(frozen=True)
class Learned:
    """The sizes of a model's learning parameters, from which the cost of a training step follows.

    Attributes:
        own: multiply-accumulate operations of one token with those of the model's weights that learn.
        added: multiply-accumulate operations of one token with weights added to the model, such as adapters.
        reached: number of blocks that gradients pass through: from the lowest block that learns to the last.
    """

    own: int
    added: int
    reached: int


def learned_of(config: PretrainedConfig, sizes: Mapping[str, int]) -> Learned:
    """The sizes of learning parameters, from a config and a list of these parameters.

    Args:
        config: config of a model of a supported family.
        sizes: number of values of each parameter that learns, by Hugging Face name; names unknown to the family are
            matrices that were added to its blocks.
    """
    family = family_of(config)
    shape = family.shape(config)
    whole = chosen = added = 0
    lowest = shape.layers
    for name, size in sizes.items():
        lowest = min(lowest, _lowest_block(family, name, shape.layers))
        try:
            parameter = family.locate(name)
        except UserError:
            added += size
            continue
        if len(parameter.axes) < 2 or (parameter.role in EMBEDDINGS and not _is_output(family, config, parameter.role)):
            continue  # norms, biases and embeddings take no matrix product
        if parameter.expert is not None:
            chosen += size
        else:
            whole += size * (shape.heads if parameter.role is Role.SHARED_RICHER_HEADS else 1)
    if shape.experts is not None and family.chosen_experts is not None:
        chosen = chosen * getattr(config, family.chosen_experts) // shape.experts
    return Learned(whole + chosen, added, shape.layers - lowest)


def learned_by(model: PreTrainedModel) -> Learned:
    """The sizes of the parameters of a model that get a gradient."""
    learning = {plain_name(name): p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return learned_of(model.config, learning)


def step_flops(config: PretrainedConfig, length: int, learned: Learned) -> int:
    """FLOPs of a training step on one sample, forward and backward.

    Args:
        config: config of the model.
        length: number of tokens in the sample.
        learned: sizes of the parameters that learn.
    """
    reached = macs(config, length, blocks=learned.reached)
    own = macs(config, length).forward + reached.backward + 2 * length * learned.own
    return own + 6 * length * learned.added


def _lowest_block(family: Family, name: str, layers: int) -> int:
    """The lowest block that a parameter's gradient passes through; ``layers`` = none."""
    if name.startswith(f"{family.blocks}."):
        return int(name.removeprefix(f"{family.blocks}.").partition(".")[0])
    return 0 if family.outer.get(name.rpartition(".")[0]) in EMBEDDINGS else layers


def _is_output(family: Family, config: PretrainedConfig, role: Role) -> bool:
    return role is Role.EMBEDDING and family.tied(config)
