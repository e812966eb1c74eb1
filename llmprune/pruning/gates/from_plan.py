"""Gates made from a plan, with which the whole model computes the same as the pruned model."""

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from llmprune.models.families import Role, family_of
from llmprune.plans.plan import Plan
from llmprune.pruning.gates.factors import Factors


def factors_of(plan: Plan) -> Factors:
    """The factors with which a model computes the same as the plan's pruned model: zero for removed units.

    A plan's merges and corrections can't be gates; they change the model's weights (``Surgery.whole``). Its experts are
    masked by ``mask_experts``.
    """
    source = plan.source
    hidden = None if plan.hidden is None else _spread(plan.hidden, plan.factors.get("hidden"), source.hidden)
    residual = torch.ones(source.hidden) if hidden is None else hidden
    ones = torch.ones(len(plan.blocks))
    numbers = {
        "attention": [block.attention for block in plan.blocks],
        "mlp": [block.mlp for block in plan.blocks],
    }
    left = {
        name: torch.tensor([0.0 if (name, number) in plan.skipped else 1.0 for number in blocks])
        for name, blocks in numbers.items()
    }
    added = {
        name: _spread(blocks, plan.factors.get(name, ones) * left[name], source.layers)[:, None] * residual
        for name, blocks in numbers.items()
    }
    heads = channels = None
    if any(block.heads is not None for block in plan.blocks):
        heads = torch.zeros(source.layers, source.heads)
        for block in plan.blocks:
            scale = plan.factors.get(f"heads.{block.attention}")
            heads[block.attention] = _spread(plan.heads(block), scale, source.heads)
    if any(block.channels is not None for block in plan.blocks):
        channels = torch.zeros(source.layers, source.intermediate)
        for block in plan.blocks:
            scale = plan.factors.get(f"channels.{block.mlp}")
            channels[block.mlp] = _spread(plan.channels(block), scale, source.intermediate)
    return Factors.of(
        hidden=hidden,
        attention=added["attention"],
        mlp=added["mlp"],
        heads=heads,
        channel=channels,
        kv_heads=source.kv_heads,
        head_dim=source.head_dim,
    )


def mask_experts(model: PreTrainedModel, plan: Plan) -> list[RemovableHandle]:
    """Prevent a model's routers from choosing the experts that a plan removes; returns the hooks that do this."""
    family = family_of(model.config)
    routers = [name for name, role in family.block.items() if role is Role.ROUTER]
    handles = []
    for block in plan.blocks:
        if block.experts is None:
            continue
        gone = [expert for expert in range(plan.source.experts or 0) if expert not in block.experts]

        def mask(module: nn.Module, inputs: object, logits: Tensor, gone: list[int] = gone) -> Tensor:
            return logits.index_fill(-1, torch.tensor(gone, device=logits.device), -torch.inf)

        for name in routers if gone else ():
            router = model.get_submodule(f"{family.blocks}.{block.mlp}.{name}")
            handles.append(router.register_forward_hook(mask))
    return handles


def _spread(kept: list[int] | tuple[int, ...], values: Tensor | None, size: int) -> Tensor:
    """A vector of zeros, with ``values`` (or ones) at the places in ``kept``."""
    spread = torch.zeros(size)
    spread[list(kept)] = torch.ones(len(kept)) if values is None else values.float()
    return spread
