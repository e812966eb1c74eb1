"""Families of models with a non-linear layer on the output of each attention head (richer heads)."""

from dataclasses import dataclass, replace
from typing import Literal

from llmprune.models.families.base import Family
from llmprune.models.families.roles_and_axes import Role
from llmprune.utils.errors import UserError
from llmprune.utils.settings import check_settings

FIELD = "llmprune_richer_heads"  # name of the config's field


@dataclass
class RicherHeadsConfig:
    """A non-linear layer on the output o of every attention head: act(W o + b), with W [head_dim, head_dim].

    Attributes:
        shared: use one W for all heads of a block; false = one W for each head.
        activation: activation function act: silu, gelu, tanh or relu.
        residual: compute o + act(W o + b) instead, which equals o before training.
    """

    shared: bool = True
    activation: Literal["silu", "gelu", "tanh", "relu"] = "silu"
    residual: bool = False

    def check(self) -> None:
        """Raise ``UserError`` for settings that are not possible or can't learn."""
        if not isinstance(self.shared, bool) or not isinstance(self.residual, bool):
            raise UserError("shared and residual of richer heads are true or false")
        check_settings(self, "richer_heads")
        if self.residual and self.activation == "relu":
            raise UserError(
                "the residual form begins at relu(0), where no gradient passes: it would never learn; choose silu, "
                "gelu or tanh"
            )


def attention_output(family: Family) -> str:
    """The name of the attention's output matrix within a block."""
    outputs = (Role.ATTENTION_OUT, Role.ATTENTION_OUT_TO_NORM)
    return next(name for name, role in family.block.items() if role in outputs)


def module_name(family: Family) -> str:
    """The name of the module of richer heads within a block."""
    return f"{attention_output(family).rpartition('.')[0]}.richer_heads"


def richer_family(family: Family, *, shared: bool) -> Family:
    """The family with a non-linear layer on the output of each head."""
    role = Role.SHARED_RICHER_HEADS if shared else Role.RICHER_HEADS
    return replace(
        family,
        name=f"{family.name}_richer",
        description=f"{family.description}; with richer heads",
        block={**family.block, module_name(family): role},
    )
