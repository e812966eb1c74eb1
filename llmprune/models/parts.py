"""Parts of a model that a user names: output, final_norm, block.N."""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from llmprune.errors import UserError
from llmprune.families import Role, family_of
from llmprune.models.walking import blocks_of

_OUTER = {"output": Role.OUTPUT, "final_norm": Role.FINAL_NORM}


def parameters_behind(model: PreTrainedModel, block: int, names: Iterable[str]) -> list[nn.Parameter]:
    """The parameters of parts of a model that lie behind its first so many blocks.

    Args:
        model: of a supported family.
        block: the first block that may be named.
        names: ``output``, ``final_norm`` or ``block.N``.

    Raises:
        UserError: there is no such part, or it does not lie there.
    """
    family, blocks = family_of(model.config), blocks_of(model)
    found: list[nn.Parameter] = []
    names = [*names]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the part '{name}' is named twice")
        kind, _, number = name.partition(".")
        if name == "output" and family.tied(model.config):
            raise UserError("the output layer of this model is its embedding, too: it can't train by itself")
        if name in _OUTER:
            found += model.get_submodule(family.outer_name(_OUTER[name])).parameters()
        elif kind == "block" and number.isdecimal() and block <= int(number) < len(blocks):
            found += blocks[int(number)].parameters()
        else:
            where = f", or block.N with N from {block} to {len(blocks) - 1}" if block < len(blocks) else ""
            raise UserError(f"there is no part '{name}' behind the span: name output, final_norm{where}")
    return found
