"""Matrices in four bits (nf4 with double quantisation, QLoRA, arXiv:2305.14314), by bitsandbytes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from llmprune.models.families import Role, family_of

NF4_ITEMSIZE = 0.52  # bytes per number, with its share of the scales
MARK = "four_bits__"  # prefix of the buffers that describe a packed matrix
_DOT = "__dot__"


def quantization(config: PretrainedConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The quantisation settings of Transformers: all matrices of the blocks except routers.

    Args:
        config: config of the model.
        dtype: dtype in which matrix products are computed.
    """
    family = family_of(config)
    routers = [name for name, role in family.block.items() if role is Role.ROUTER]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[family.outer_name(Role.OUTPUT), *routers],
    )


def describe_packed(model: nn.Module) -> None:
    """Add buffers that describe packed matrices, so that a model's state dict contains the descriptions.

    bitsandbytes adds entries that are neither parameters nor buffers. Composer can't save such entries, nor can PyTorch
    load them.
    """
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            for name, value in state.as_dict(packed=True).items():
                module.register_buffer(MARK + name.replace(".", _DOT), value.clone())
            module._register_state_dict_hook(_leave_out)


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}weight.")]:
        del state[name]


def written_out(packed: Tensor, description: Mapping[str, Tensor]) -> Tensor:
    """A packed matrix as numbers again, in the dtype that it was quantised from.

    Args:
        packed: packed matrix.
        description: buffers that describe the packed matrix, by name.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit  # takes seconds

    facts = {name.removeprefix(MARK).replace(_DOT, "."): value for name, value in description.items()}
    return dequantize_4bit(packed, QuantState.from_dict(qs_dict=facts, device=torch.device("cpu")))
