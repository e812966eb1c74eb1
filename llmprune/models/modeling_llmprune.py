"""Causal LMs of any Transformers architecture with richer heads, a replacement module, or blocks without a sub-layer.

This file imports nothing of llmprune. It is in the folder of such a model, which loads with ``trust_remote_code=True``
wherever llmprune is not installed. With richer heads, the output of every attention head passes through a small
non-linear layer before the heads are joined. A replacement module, in the place of removed blocks, reads the residual
stream [batch, length, hidden] and adds to it. Both process each token separately, so neither needs a cache. A block
can lack its attention or its MLP, which then take no time and no memory.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN

PREFIX = "llmprune_"  # prefix of the model types


class Mean(nn.Module):
    """x + b, where b is the mean of what the removed blocks add."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.settings = {"hidden": hidden}

    def forward(self, states: Tensor) -> Tensor:
        """Add the network's output to the hidden states, [batch, length, hidden]."""
        return states + self.bias.to(states.dtype)


class Linear(nn.Module):
    """x + A x + b."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.update = nn.Linear(hidden, hidden)
        _to_zero(self.update)
        self.settings = {"hidden": hidden}

    def forward(self, states: Tensor) -> Tensor:
        """Add the network's output to the hidden states, [batch, length, hidden]."""
        return states + self.update(states.to(self.update.weight.dtype)).to(states.dtype)


class FFN(nn.Module):
    """x + B relu(A norm(x))."""

    def __init__(self, hidden: int, intermediate: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps)
        self.up = nn.Linear(hidden, intermediate)
        self.down = nn.Linear(intermediate, hidden)
        _to_zero(self.down)
        self.settings = {"hidden": hidden, "intermediate": intermediate, "eps": eps}

    def forward(self, states: Tensor) -> Tensor:
        """Add the network's output to the hidden states, [batch, length, hidden]."""
        x = self.norm(states.to(self.norm.weight.dtype))
        return states + self.down(F.relu(self.up(x))).to(states.dtype)


class SwiGLU(nn.Module):
    """x + C (silu(A norm(x)) ⊙ B norm(x)) (arXiv:2002.05202)."""

    def __init__(self, hidden: int, intermediate: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden, eps)
        self.gate = nn.Linear(hidden, intermediate, bias=False)
        self.up = nn.Linear(hidden, intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)
        _to_zero(self.down)
        self.settings = {"hidden": hidden, "intermediate": intermediate, "eps": eps}

    def forward(self, states: Tensor) -> Tensor:
        """Add the network's output to the hidden states, [batch, length, hidden]."""
        x = self.norm(states.to(self.norm.weight.dtype))
        return states + self.down(F.silu(self.gate(x)) * self.up(x)).to(states.dtype)


NETWORKS: dict[str, type[nn.Module]] = {"mean": Mean, "linear": Linear, "ffn": FFN, "swiglu": SwiGLU}


def _to_zero(layer: nn.Linear) -> None:
    """Set a layer to zero, so that an untrained replacement module is no worse than the removal of the blocks."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class RicherHeads(nn.Module):
    """act(W o + b) of each head's output o; as a residual, o + act(W o + b), which is o while W and b are zero.

    Attributes:
        weight: matrix W, shared by all heads, [head_dim, head_dim], or the heads' matrices one below the other, [heads
            · head_dim, head_dim].
        bias: bias b, shared by all heads, [head_dim], or the heads' biases one after the other, [heads · head_dim].
    """

    def __init__(self, heads: int, head_dim: int, *, shared: bool, activation: str, residual: bool, std: float) -> None:
        super().__init__()
        rows = head_dim if shared else heads * head_dim
        self.weight = nn.Parameter(torch.zeros(rows, head_dim))
        self.bias = nn.Parameter(torch.zeros(rows))
        self.activation, self.shared, self.residual, self.std = ACT2FN[activation], shared, residual, std
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """Set the initial values: small random ones or, as a residual, zero."""
        self.bias.zero_()
        if self.residual:
            self.weight.zero_()
        else:
            self.weight.normal_(std=self.std)

    def forward(self, joined: Tensor) -> Tensor:
        """The richer output of the heads, [..., heads · head_dim], from their output of the same shape."""
        size = self.weight.shape[1]
        heads = joined.unflatten(-1, (-1, size))
        if self.shared:
            found = F.linear(heads, self.weight, self.bias)
        else:
            matrices = self.weight.unflatten(0, (-1, size))
            rows = torch.bmm(heads.flatten(0, -3).transpose(0, 1), matrices.mT)  # [heads, tokens, head_dim]
            found = (rows.transpose(0, 1) + self.bias.view(-1, size).to(rows.dtype)).view_as(heads)
        found = self.activation(found)
        return (heads + found if self.residual else found).flatten(-2)

    def before(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Apply the richer heads to the input of the attention's output matrix (as a hook before its forward pass)."""
        return (self(inputs[0]), *inputs[1:])

    def follow(self, matrix: nn.Module) -> None:
        """Register ``before`` on ``matrix`` itself, and remove it from every module within it.

        Other code replaces the original matrix by a wrapper with adapters, or by a packed matrix.
        """
        if self.before in matrix._forward_pre_hooks.values():
            return
        for inner in matrix.modules():
            for key in [key for key, hook in inner._forward_pre_hooks.items() if hook == self.before]:
                del inner._forward_pre_hooks[key]
        matrix.register_forward_pre_hook(self.before)


class Nothing(nn.Module):
    """A sub-layer that the model does not have: it adds zero to the residual stream.

    Attributes:
        pair: whether the result is a pair of zeros and None, as that of an attention.
    """

    def __init__(self, instead_of: nn.Module, pair: bool) -> None:
        super().__init__()
        for name, value in vars(instead_of).items():  # what a block reads of its sub-layers, such as is_sliding
            if isinstance(value, bool | int | str) and not name.startswith("_"):
                setattr(self, name, value)
        self.pair = pair

    def forward(self, *inputs: Tensor, hidden_states: Tensor | None = None, **others: Any) -> Any:
        """Zeros like the hidden states, which are the first argument, or have its name."""
        zeros = torch.zeros_like(inputs[0] if hidden_states is None else hidden_states)
        return (zeros, None) if self.pair else zeros


class _Following:
    """A hook before an attention's forward pass that moves its richer heads to its current output matrix."""

    def __init__(self, heads: RicherHeads, name: str) -> None:
        self.heads, self.name = heads, name

    def __call__(self, attention: nn.Module, inputs: Any) -> None:
        self.heads.follow(getattr(attention, self.name))


def host(place: int) -> int:
    """The number of the block that contains a replacement module at block ``place``: the block before, if any."""
    return max(place - 1, 0)


def _attach(model: PreTrainedModel) -> None:
    """Add the modules that the config describes to the model, and take out what it lacks."""
    if model.config.llmprune_skipped is not None:
        _take_out(model, **model.config.llmprune_skipped)
    if model.config.llmprune_richer_heads is not None:
        _attach_heads(model, **model.config.llmprune_richer_heads)
    if model.config.llmprune_replacement is not None:
        _attach_replacement(model, model.config.llmprune_replacement)


def _take_out(
    model: PreTrainedModel,
    blocks: str,
    parts: dict[str, dict[str, list[str]]],
    attention: tuple[int, ...] = (),
    mlp: tuple[int, ...] = (),
) -> None:
    """Take sub-layers out of blocks.

    Args:
        model: model that has all sub-layers.
        blocks: name of the model's list of blocks.
        parts: for both sub-layers, the names within a block of the modules that are ``silent`` without the sub-layer,
            and of those that are ``unused``.
        attention: numbers of the blocks without attention.
        mlp: numbers of the blocks without an MLP.
    """
    listed = list(model.get_submodule(blocks).children())
    for name, numbers in (("attention", attention), ("mlp", mlp)):
        for number in numbers:
            for module in parts[name]["silent"]:
                before = getattr(listed[number], module)
                setattr(listed[number], module, Nothing(before, pair=name == "attention"))
            for module in parts[name]["unused"]:
                setattr(listed[number], module, nn.Identity())
    if attention:
        _renumber_caches(model, [getattr(block, parts["attention"]["silent"][0]) for block in listed])


def _renumber_caches(model: PreTrainedModel, attentions: list[nn.Module]) -> None:
    """Give the attentions that are left the first places in the cache, which tell how long the text is.

    An attention with a sliding window needs a place for such attentions, so each kind has its own places.
    """
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(attentions)
    for kind in set(kinds):
        places = [place for place, found in enumerate(kinds) if found == kind]
        left = [attentions[place] for place in places if not isinstance(attentions[place], Nothing)]
        for place, attention in zip(places, left, strict=False):
            attention.layer_idx = place  # type: ignore[assignment]
        if kind == kinds[0] and not left:
            raise ValueError(f"no {kind} is left, which the first place in the cache is for")


def _attach_heads(
    model: PreTrainedModel, blocks: str, output: str, shared: bool, activation: str, residual: bool
) -> None:
    """Add richer heads to every attention.

    Args:
        model: model that gets the richer heads.
        blocks: name of the model's list of blocks.
        output: name of the attention's output matrix within a block.
        shared: whether all heads of a block share one matrix.
        activation: name of the activation function in Transformers.
        residual: whether the layer is added to its input, see ``RicherHeads``.
    """
    config, (place, _, name) = model.config, output.rpartition(".")
    for block in model.get_submodule(blocks).children():
        attention, matrix = block.get_submodule(place), block.get_submodule(output)
        size: int = matrix.in_features // config.num_attention_heads  # type: ignore[assignment, operator]
        std = float(getattr(config, "initializer_range", getattr(config, "init_std", 0.02)))
        attention.richer_heads = heads = RicherHeads(
            config.num_attention_heads, size, shared=shared, activation=activation, residual=residual, std=std
        )
        heads.follow(matrix)
        attention.register_forward_pre_hook(_Following(heads, name))


def _attach_replacement(model: PreTrainedModel, described: dict[str, Any]) -> None:
    """Add the replacement module to the block next to it."""
    block = model.get_submodule(described["blocks"])[host(described["place"])]  # type: ignore[index]
    block.replacement = NETWORKS[described["kind"]](**described["settings"])
    block.__class__ = _hosting(type(block), described["place"] == 0)


def _hosting(block: type[nn.Module], first: bool) -> type[nn.Module]:
    """A subclass of a block with a replacement module before it (if it is the model's first block) or after it."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if first:
            return block.forward(self, self.replacement(hidden_states), *args, **kwargs)
        found = block.forward(self, hidden_states, *args, **kwargs)
        if isinstance(found, tuple):
            return (self.replacement(found[0]), *found[1:])
        return self.replacement(found)

    return type(block.__name__, (block,), {"forward": forward, "__module__": __name__})


def register(model_type: str) -> None:
    """Register a model type with the prefix ``PREFIX``: Transformers then loads it without the file in the folder."""
    plain = model_type.removeprefix(PREFIX)
    if model_type not in CONFIG_MAPPING:
        AutoConfig.register(model_type, config_class(plain))
        AutoModelForCausalLM.register(config_class(plain), model_class(plain))


@cache
def config_class(model_type: str) -> type[PretrainedConfig]:
    """The config class of such models, with the name ``config_of_TYPE`` in this module."""
    base = CONFIG_MAPPING[model_type]
    body = {
        "model_type": PREFIX + model_type,
        "llmprune_richer_heads": None,
        "llmprune_replacement": None,
        "llmprune_skipped": None,
        "_auto_class": "AutoConfig",  # this file is copied wherever such a model is saved
        "__module__": __name__,
    }
    return type(f"config_of_{model_type}", (base,), body)


@cache
def model_class(model_type: str) -> type[PreTrainedModel]:
    """The model class of such models, with the name ``model_of_TYPE`` in this module."""
    base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]

    def initialise(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        self.loss_type = "ForCausalLM"  # otherwise Transformers derives it from the class's name
        _attach(self)

    body = {
        "config_class": config_class(model_type),
        "__init__": initialise,
        "_auto_class": "AutoModelForCausalLM",
        "__module__": __name__,
    }
    return type(f"model_of_{model_type}", (base,), body)


def __getattr__(name: str) -> Any:
    """The classes of a model type, by name."""
    for prefix, make in (("config_of_", config_class), ("model_of_", model_class)):
        if name.startswith(prefix):
            return make(name.removeprefix(prefix))
    raise AttributeError(name)
