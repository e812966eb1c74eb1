"""The placement of a model: number format, device and attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from llmprune.models.number_formats import DTYPES, dtype_for_inference
from llmprune.utils.errors import UserError, nearest
from llmprune.utils.formats import Attention, Device, InferenceFormat, TeacherFormat
from llmprune.utils.settings import check_settings

TRAINABLE: tuple[str, ...] = get_args(TeacherFormat)


@dataclass(frozen=True)
class Placement:
    """Number format, device and attention to load a model with.

    Attributes:
        dtype: number format of the weights: float32, bfloat16, float16; ``auto`` = bfloat16 where it is fast (GPUs,
            processors with AVX512-BF16 or AMX), else float32; quantised weights stay as they are.
        device: cpu or gpu; None = gpu if there is one.
        device_map: distribution of the model over devices: ``auto`` = over all devices and the machine's memory; None =
            one device.
        attention: implementation of attention: ``sdpa``, ``eager`` or ``flash_attention_2``; None = sdpa if the
            architecture supports it.
        adapter: folder of a PEFT adapter to add to the model; None = no adapter.
    """

    dtype: InferenceFormat = "auto"
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
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return dtype_for_inference(self.dtype, on_gpu=self.on_gpu)
