"""The number formats of weights and of matrix products, and where bfloat16 is fast."""

import os

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SLOW = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}


def bfloat16_is_fast(*, on_gpu: bool) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32.

    They are on GPUs, except those older than 2020, and on processors with AVX512-BF16 or AMX, unless oneDNN's own
    variable ``ONEDNN_MAX_CPU_ISA`` forbids these instructions. On other processors bfloat16 is many times slower than
    float32.
    """
    if on_gpu:  # an estimate may be for GPUs that are elsewhere
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in _SLOW:
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def dtype_for_inference(name: str, *, on_gpu: bool) -> torch.dtype:
    """The dtype of the weights of a model that does not learn.

    Args:
        name: name of a dtype; ``auto`` = bfloat16 where it is fast, else float32.
        on_gpu: whether the model is on a GPU.
    """
    if name != "auto":
        return DTYPES[name]
    return torch.bfloat16 if bfloat16_is_fast(on_gpu=on_gpu) else torch.float32


def weights_and_products(name: str, *, on_gpu: bool) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtypes of the weights and of the matrix products of a model whose gradients or statistics are used.

    With ``auto`` the weights stay in float32 and only the products are in bfloat16, so that small differences between
    hidden states are kept.

    Args:
        name: ``auto``, ``float32`` or ``bfloat16``.
        on_gpu: whether the model is on a GPU.

    Returns:
        The dtype of the weights, and that of products by autocast; None = that of the weights.
    """
    if name != "auto":
        return DTYPES[name], None
    return torch.float32, torch.bfloat16 if bfloat16_is_fast(on_gpu=on_gpu) else None


def precision_of(name: str, *, on_gpu: bool) -> str:
    """The precision of training, ``fp32`` or ``amp_bf16``; ``auto`` = amp_bf16 where bfloat16 is fast, else fp32."""
    if name != "auto":
        return name
    return "amp_bf16" if bfloat16_is_fast(on_gpu=on_gpu) else "fp32"
