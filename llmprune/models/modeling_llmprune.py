"""Causal LMs in which a small network stands in for blocks that were removed, for any Transformers architecture.

This file is complete in itself and lies beside the weights of such a model, which load with ``trust_remote_code=True``
wherever llmprune is not installed. A stand-in reads the residual stream [batch, length, hidden] of a token and adds to
it; it knows no other token, so it needs no cache.
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

PREFIX = "llmprune_"  # of the model types


class Mean(nn.Module):
    """x + b: what the removed blocks add, on average."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.settings = {"hidden": hidden}

    def forward(self, states: Tensor) -> Tensor:
        """Add it."""
        return states + self.bias.to(states.dtype)


class Linear(nn.Module):
    """x + A x + b."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.update = nn.Linear(hidden, hidden)
        _to_zero(self.update)
        self.settings = {"hidden": hidden}

    def forward(self, states: Tensor) -> Tensor:
        """Add it."""
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
        """Add it."""
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
        """Add it."""
        x = self.norm(states.to(self.norm.weight.dtype))
        return states + self.down(F.silu(self.gate(x)) * self.up(x)).to(states.dtype)


NETWORKS: dict[str, type[nn.Module]] = {"mean": Mean, "linear": Linear, "ffn": FFN, "swiglu": SwiGLU}


def _to_zero(layer: nn.Linear) -> None:
    """Begin with nothing: the stand-in is then no worse than the blocks' removal."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def host(place: int) -> int:
    """The number of the block that a stand-in before block ``place`` belongs to: the one before it, if there is one."""
    return max(place - 1, 0)


def _attach(model: PreTrainedModel) -> None:
    """Make the stand-in that the config describes a part of the block beside it."""
    described = model.config.llmprune_stand_in
    block = model.get_submodule(described["blocks"])[host(described["place"])]  # type: ignore[index]
    block.stand_in = NETWORKS[described["kind"]](**described["settings"])
    block.__class__ = _hosting(type(block), described["place"] == 0)


def _hosting(block: type[nn.Module], first: bool) -> type[nn.Module]:
    """A kind of block with a stand-in before (if it is the model's first) or behind it."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if first:
            return block.forward(self, self.stand_in(hidden_states), *args, **kwargs)
        found = block.forward(self, hidden_states, *args, **kwargs)
        if isinstance(found, tuple):
            return (self.stand_in(found[0]), *found[1:])
        return self.stand_in(found)

    return type(block.__name__, (block,), {"forward": forward, "__module__": __name__})


def register(model_type: str) -> None:
    """Let Transformers load models of a type that begins with ``PREFIX`` without the file beside them."""
    plain = model_type.removeprefix(PREFIX)
    if model_type not in CONFIG_MAPPING:
        AutoConfig.register(model_type, config_class(plain))
        AutoModelForCausalLM.register(config_class(plain), model_class(plain))


@cache
def config_class(model_type: str) -> type[PretrainedConfig]:
    """The class of configs of such models, which has the name ``config_of_TYPE`` here."""
    base = CONFIG_MAPPING[model_type]
    body = {"model_type": PREFIX + model_type, "llmprune_stand_in": None, "__module__": __name__}
    return type(f"config_of_{model_type}", (base,), body)


@cache
def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class of such models, which has the name ``model_of_TYPE`` here."""
    base: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]

    def initialise(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        _attach(self)

    body = {"config_class": config_class(model_type), "__init__": initialise, "__module__": __name__}
    return type(f"model_of_{model_type}", (base,), body)


def __getattr__(name: str) -> Any:
    """The classes of a model type, by their names."""
    for prefix, make in (("config_of_", config_class), ("model_of_", model_class)):
        if name.startswith(prefix):
            return make(name.removeprefix(prefix))
    raise AttributeError(name)
