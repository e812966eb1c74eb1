"""The words that settings use for number formats, devices and kinds of attention."""

from typing import Literal

Format = Literal["float32", "bfloat16", "float16"]
TrainableFormat = Literal["float32", "bfloat16"]  # formats in which gradients neither vanish nor overflow
TeacherFormat = Literal["auto", "float32", "bfloat16"]  # of a model that does not learn, see ``dtype_for_inference``
StoredFormat = Literal["auto", "float32", "bfloat16", "float16"]  # auto = as the files have it
Attention = Literal["sdpa", "eager", "flash_attention_2"]
Device = Literal["cpu", "gpu"]
