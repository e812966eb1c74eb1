"""How a model is held: its number format, device and attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from llmprune.utils.errors import UserError, nearest
from llmprune.utils.formats import Attention, Device, StoredFormat, TrainableFormat
from llmprune.utils.settings import check_settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRAINABLE: tuple[str, ...] = get_args(TrainableFormat)


def dtype_for_inference(name: str, *, on_gpu: bool) -> torch.dtype:
    """The format of the weights of a model that does not learn.

    Args:
        name: ``float32`` or ``bfloat16``; ``auto`` = bfloat16 where the device multiplies it fast: GPUs, and processors
            with AVX512-BF16 or AMX. Others need many times as long for it as for float32.
        on_gpu: whether a GPU holds it.
    """
    if name != "auto":
        return DTYPES[name]
    fast = on_gpu or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


@dataclass(frozen=True)
class Placement:
    """How to hold a model.

    Attributes:
        dtype: of the weights: float32, bfloat16, float16; ``auto`` = as stored.
        device: cpu or gpu; None = what is there.
        device_map: ``auto`` spreads the model over all devices and the machine's memory; None = one device.
        attention: ``sdpa``, ``eager`` or ``flash_attention_2``; None = sdpa where the architecture has it.
        adapter: folder of a PEFT adapter to put on the model.
    """

    dtype: StoredFormat = "auto"
    device: Device | None = None
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    attention: Attention | None = None
    adapter: str | None = None

    def check(self, dtypes: Sequence[str] = ("auto", *DTYPES)) -> None:
        """Raise ``UserError`` for what is unknown or not there; ``dtypes`` are those that will do."""
        check_settings(self)
        if self.dtype not in dtypes:
            raise UserError(f"dtype '{self.dtype}' is unknown; {nearest(self.dtype, dtypes)}")
        if self.adapter is not None and not (Path(self.adapter) / "adapter_config.json").is_file():
            raise UserError(f"{self.adapter} holds no adapter: it has no adapter_config.json")
        if self.device == "gpu" and not torch.cuda.is_available():
            raise UserError("the device is gpu, but there is none")

    @property
    def on_gpu(self) -> bool:
        """Whether one GPU holds it, unless there is a device map."""
        return self.device == "gpu" or (self.device is None and torch.cuda.is_available())

    @property
    def torch_device(self) -> torch.device:
        """The one device, unless there is a device map."""
        return torch.device("cuda" if self.on_gpu else "cpu")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """Of the weights; None = as stored."""
        return DTYPES.get(self.dtype)
