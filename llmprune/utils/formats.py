"""The names that settings use for number formats, devices and attention implementations."""

from typing import Literal

Format = Literal["float32", "bfloat16", "float16"]
TrainableFormat = Literal["float32", "bfloat16"]  # formats in which gradients neither vanish nor overflow
# auto = bfloat16 where products in it are fast, else float32; see ``llmprune.models.number_formats``
TeacherFormat = Literal["auto", "float32", "bfloat16"]
InferenceFormat = Literal["auto", "float32", "bfloat16", "float16"]
Precision = Literal["auto", "fp32", "amp_bf16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Device = Literal["cpu", "gpu"]
