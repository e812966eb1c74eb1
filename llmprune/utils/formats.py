"""The names that settings use for number formats, devices and attention implementations."""

from typing import Literal

Format = Literal["float32", "bfloat16", "float16"]
TrainableFormat = Literal["float32", "bfloat16"]  # formats in which gradients neither vanish nor overflow
TeacherFormat = Literal["auto", "float32", "bfloat16"]  # for a model that does not learn, see ``dtype_for_inference``
StoredFormat = Literal["auto", "float32", "bfloat16", "float16"]  # auto = the format of the files
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Device = Literal["cpu", "gpu"]
