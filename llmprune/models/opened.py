"""A model ready for use: weights on their device, with its tokenizer."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llmprune.errors import UserError, nearest
from llmprune.models.loading import load_any_model, load_tokenizer, resolve_model
from llmprune.models.memory import check_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """How to hold a model.

    Attributes:
        dtype: of the weights: float32, bfloat16, float16; ``auto`` = as stored.
        device: cpu or gpu; None = what is there.
        device_map: ``auto`` spreads the model over all devices and the machine's memory; None = one device.
        attention: ``sdpa``, ``eager`` or ``flash_attention_2``.
        adapter: folder of a PEFT adapter to put on the model.
    """

    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    attention: str = "sdpa"
    adapter: str | None = None

    def check(self) -> None:
        """Raise ``UserError`` for what is unknown or not there."""
        for word, value, valid in (
            ("dtype", self.dtype, ("auto", *DTYPES)),
            ("device map", self.device_map or "auto", ("auto", "balanced", "sequential")),
            ("attention", self.attention, ("sdpa", "eager", "flash_attention_2")),
        ):
            if value not in valid:
                raise UserError(f"{word} '{value}' is unknown; {nearest(value, valid)}")
        if self.adapter is not None and not (Path(self.adapter) / "adapter_config.json").is_file():
            raise UserError(f"{self.adapter} holds no adapter: it has no adapter_config.json")
        if self.device not in (None, "cpu", "gpu"):
            raise UserError(f"device '{self.device}' is unknown; valid: cpu, gpu")
        if self.device == "gpu" and not torch.cuda.is_available():
            raise UserError("device is gpu, but there is none")

    @property
    def torch_device(self) -> torch.device:
        """The one device, unless there is a device map."""
        on_gpu = self.device == "gpu" or (self.device is None and torch.cuda.is_available())
        return torch.device("cuda" if on_gpu else "cpu")


@dataclass(frozen=True)
class OpenedModel:
    """A model in evaluation mode with its tokenizer.

    Attributes:
        name: as the user gave it.
        folder: where it lies.
        model: its weights.
        tokenizer: its own.
    """

    name: str
    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def parameters(self) -> int:
        """How many there are; packed ones of a quantised model count as what they stand for."""
        model = self.model
        if getattr(model.config, "quantization_config", None) is not None:
            plain = copy.deepcopy(model.config)
            del plain.quantization_config
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(plain)
        return sum(p.numel() for p in model.parameters())


def open_model(name: str, placement: Placement) -> OpenedModel:
    """Open a causal LM of any architecture.

    Args:
        name: folder or hub name.
        placement: how to hold it.

    Raises:
        UserError: it can't be read or is too large, or the placement is impossible.
    """
    placement.check()
    tokenizer = load_tokenizer(name)
    device = placement.torch_device
    if placement.device_map is None:
        remedy = "spread it over all devices with --device-map auto, or take bfloat16"
        check_memory(name, dtype=DTYPES.get(placement.dtype), on_gpu=device.type == "cuda", remedy=remedy)
    model = load_any_model(
        name,
        dtype=placement.dtype if placement.dtype == "auto" else DTYPES[placement.dtype],
        attention=placement.attention,
        device_map=placement.device_map,
        adapter=placement.adapter,
    )
    if placement.device_map is None:
        model.to(device)  # type: ignore[arg-type]
    return OpenedModel(name, resolve_model(name), model, tokenizer)
