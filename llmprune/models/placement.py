"""The placement of a model: number format, device and attention."""

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
    """The dtype of the weights of a model that does not learn.

    Args:
        name: name of a dtype: ``float32`` or ``bfloat16``; ``auto`` = bfloat16 on devices with fast bfloat16 products:
            GPUs, and processors with AVX512-BF16 or AMX. On other processors bfloat16 is many times slower than
            float32.
        on_gpu: whether the model is on a GPU.
    """
    if name != "auto":
        return DTYPES[name]
    fast = on_gpu or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


@dataclass(frozen=True)
class Placement:
    """Number format, device and attention to load a model with.

    Attributes:
        dtype: number format of the weights: float32, bfloat16, float16; ``auto`` = as stored.
        device: cpu or gpu; None = gpu if there is one.
        device_map: distribution of the model over devices: ``auto`` = over all devices and the machine's memory; None =
            one device.
        attention: implementation of attention: ``sdpa``, ``eager`` or ``flash_attention_2``; None = sdpa if the
            architecture supports it.
        adapter: folder of a PEFT adapter to add to the model; None = no adapter.
    """

    dtype: StoredFormat = "auto"
    device: Device | None = None
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    attention: Attention | None = None
    adapter: str | None = None

    def check(self, dtypes: Sequence[str] = ("auto", *DTYPES)) -> None:
        """Raise ``UserError`` for values that are unknown or not available; ``dtypes`` are the valid formats."""
        check_settings(self)
        if self.dtype not in dtypes:
            raise UserError(f"dtype '{self.dtype}' is unknown; {nearest(self.dtype, dtypes)}")
        if self.adapter is not None and not (Path(self.adapter) / "adapter_config.json").is_file():
            raise UserError(f"{self.adapter} holds no adapter: it has no adapter_config.json")
        if self.device == "gpu" and not torch.cuda.is_available():
            raise UserError("the device is gpu, but this machine has no GPU")

    @property
    def on_gpu(self) -> bool:
        """Whether the model is on one GPU, unless there is a device map."""
        return self.device == "gpu" or (self.device is None and torch.cuda.is_available())

    @property
    def torch_device(self) -> torch.device:
        """The device of the model, unless there is a device map."""
        return torch.device("cuda" if self.on_gpu else "cpu")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype of the weights; None = as stored."""
        return DTYPES.get(self.dtype)
