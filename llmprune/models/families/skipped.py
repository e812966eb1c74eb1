"""Sub-layers that a model does not have: blocks without attention, or without an MLP."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig

from llmprune.models.families.base import Family
from llmprune.models.families.roles_and_axes import SUBLAYERS, Role
from llmprune.utils.errors import UserError

SKIPPED = "llmprune_skipped"  # name of the config's field


@dataclass(frozen=True)
class Parts:
    """The modules of a block that a sub-layer consists of, by name.

    Attributes:
        silent: modules whose output is what the sub-layer adds to the residual stream: zero without it.
        unused: other modules, which pass on what they get without it.
    """

    silent: tuple[str, ...]
    unused: tuple[str, ...]


def parts_of(family: Family, sublayer: str) -> Parts:
    """The modules of a sub-layer in every block of a family.

    The module around its matrices, if there is one, is silent, else its output matrix; its norms are unused.
    """
    roles = {name: role for name, role in family.block.items() if role in SUBLAYERS[sublayer]}
    around = {name.partition(".")[0] for name in roles if "." in name}
    silent = around or {name for name, role in roles.items() if role in (Role.MLP_OUT, Role.MLP_OUT_TO_NORM)}
    direct = {name for name in roles if "." not in name}
    return Parts(tuple(sorted(silent)), tuple(sorted(direct - silent)))


def skipped_of(config: PretrainedConfig) -> Mapping[str, tuple[int, ...]]:
    """The numbers of the blocks that lack a sub-layer, by sub-layer; empty = all blocks have both."""
    found = getattr(config, SKIPPED, None) or {}
    return {name: tuple(found[name]) for name in ("attention", "mlp") if found.get(name)}


def refuse_skipped(config: PretrainedConfig, doing: str) -> None:
    """Refuse a model some of whose blocks lack a sub-layer.

    Args:
        config: config of the model.
        doing: what is not possible with such a model, as a participle.

    Raises:
        UserError: a block lacks its attention or its MLP.
    """
    if skipped_of(config):
        raise UserError(
            f"blocks of this model have no attention or no MLP: it can be trained, cut and measured, but not {doing}"
        )
