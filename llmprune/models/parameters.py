"""Parts of a model by name: output, final_norm, embedding, norms, block.N, last.K, all, or a parameter's name."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from llmprune.models.block_hooks import blocks_of
from llmprune.models.families import EMBEDDINGS, NORMS, Role, family_of
from llmprune.utils.errors import UserError

_OUTER = {"output": Role.OUTPUT, "final_norm": Role.FINAL_NORM}


def parameter_names_of(model: PreTrainedModel, parts: Sequence[str]) -> list[str]:
    """The names of the parameters of parts of a model, each once, in the model's order.

    Args:
        model: model of a supported family.
        parts: names of parts: ``output``, ``final_norm``, ``embedding``, ``norms``, ``block.N``, ``last.K`` (the last K
            blocks), ``all``, or the name of a parameter or of a module, in which ``*`` matches anything between two
            dots.

    Raises:
        UserError: the model has no such part.
    """
    family, layers = family_of(model.config), len(blocks_of(model))
    if "output" in parts and family.tied(model.config):
        raise UserError(
            "the output layer of this model is its embedding, too: it can't train by itself; name embedding, or all"
        )
    roles = {name: family.locate(name) for name, _ in model.named_parameters()}
    chosen: set[str] = set()
    for part in parts:
        kind, _, number = part.partition(".")
        blocks: Iterable[int] = ()
        if kind in ("block", "last") and number.isdecimal():
            first = int(number) if kind == "block" else layers - int(number)
            last = first if kind == "block" else layers - 1
            if not 0 <= first <= last < layers:
                raise UserError(f"there is no part '{part}': the model has {layers} blocks, counted from 0")
            blocks = range(first, last + 1)
        wanted = re.compile(re.escape(part).replace(r"\*", r"[^.]+") + r"(\.|$)")
        found = {
            name
            for name, parameter in roles.items()
            if part == "all"
            or (parameter.block is not None and parameter.block in blocks)
            or (part in _OUTER and parameter.role is _OUTER[part])
            or (part == "embedding" and parameter.role in EMBEDDINGS)
            or (part == "norms" and parameter.role in NORMS)
            or wanted.match(name)
        }
        if not found:
            raise UserError(
                f"there is no part '{part}': name output, final_norm, embedding, norms, block.N, last.K, all, or a "
                f"parameter or module such as {next(iter(roles)).rpartition('.')[0]}"
            )
        chosen |= found
    return [name for name in roles if name in chosen]


def parameters_after(model: PreTrainedModel, block: int, names: Iterable[str]) -> list[nn.Parameter]:
    """The parameters of parts of a model that are after its first ``block`` blocks.

    Args:
        model: model of a supported family.
        block: number of the first block that may be named.
        names: names of parts: ``output``, ``final_norm`` or ``block.N``.

    Raises:
        UserError: the model has no such part, or the part is not after these blocks.
    """
    names, layers = [*names], len(blocks_of(model))
    for name in names:
        kind, _, number = name.partition(".")
        if names.count(name) > 1:
            raise UserError(f"the part '{name}' is named twice")
        if name not in _OUTER and not (kind == "block" and number.isdecimal() and block <= int(number) < layers):
            where = f", or block.N with N from {block} to {layers - 1}" if block < layers else ""
            raise UserError(f"there is no part '{name}' after the span: name output, final_norm{where}")
    return [model.get_parameter(name) for name in parameter_names_of(model, names)]


def train_only(model: nn.Module, optimizers: Iterable[Optimizer], chosen: Sequence[nn.Parameter]) -> None:
    """Freeze all parameters of a model except the chosen ones, which replace the parameters of its optimisers."""
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = []
        optimizer.param_groups[0]["params"] = [*chosen]


def init_optimizer_state(optimizer: Optimizer) -> None:
    """Create the optimizer state that an optimiser's first step would create, and leave the weights as they are.

    Sharded checkpoints load only into state that exists.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter in parameters:
        made: dict[str, Any] = optimizer.state[parameter]
        if "step" in made:
            made["step"] = torch.zeros_like(made["step"]) if isinstance(made["step"], torch.Tensor) else 0


def plain_name(name: str) -> str:
    """A parameter's name without the parts that activation checkpointing adds."""
    return name.replace("_checkpoint_wrapped_module.", "")
