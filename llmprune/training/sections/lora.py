"""``lora``: low-rank adapters."""

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from composer import Callback
from composer.utils import get_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.callbacks.low_rank_adaptation import LowRankAdaptation
from llmprune.config.section_registry import SECTIONS
from llmprune.estimate.needs import Needs, autocast_of
from llmprune.models.number_formats import DTYPES
from llmprune.recovery.four_bits import NF4_ITEMSIZE, quantization
from llmprune.recovery.lora import AdaptedWeights, LoRAConfig, add_adapters, base_name, lora_targets
from llmprune.training.section import Build, Inputs, Section
from llmprune.utils.errors import UserError


@SECTIONS.register("lora")
class LoRASection(Section[LoRAConfig]):
    """Low-rank adapters beside frozen matrices."""

    name = "lora"
    rate = 4.0  # new weights beside frozen ones take larger steps (arXiv:2305.14314, 2403.19135)
    settings = LoRAConfig
    places = ()
    fixed = ("rank", "alpha", "dropout", "targets", "quantize")
    decides = ("train.microbatch_size",)  # the microbatch size changes dropout
    chooses_weights = True

    def check_inputs(self, inputs: Inputs) -> None:
        """Check that the model has the target matrices."""
        lora_targets(inputs.model_config, self.own.targets)

    def check_own(self) -> None:
        """Check that there is a pretrained model, and that its weights can be held in the configured format."""
        own, config = self.own, self.config
        if config.model.path is None:
            raise UserError("adapters train beside a model's weights: name it with model.path")
        if config.sharding is not None and config.model.dtype != "float32":
            raise UserError(
                "adapters are float32 and shards hold one dtype: take model.dtype=float32 (on GPUs "
                "with train.precision=amp_bf16), or leave out sharding"
            )
        if own.quantize is None:
            return
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError("the package bitsandbytes is not installed: pip install -e .")
        if config.sharding is not None:
            raise UserError(
                "a base of four bits can't be sharded, every rank holds it: leave out sharding or lora.quantize"
            )

    def quantization(self, inputs: Inputs) -> Any:
        """Four-bit quantisation of the blocks' matrices, if the settings ask for it."""
        return None if self.own.quantize is None else quantization(inputs.model_config, DTYPES[self.config.model.dtype])

    def callbacks(self, build: Build) -> Iterable[Callback]:
        """The callback ``LowRankAdaptation``."""
        config = self.config
        products = autocast_of(config, "cuda" if get_device(config.train.device).name == "gpu" else "cpu")
        as_loaded = config.sharding is not None or self.own.quantize is not None
        frozen = None if as_loaded else products
        return [LowRankAdaptation(self.own, seed=config.run.seed, frozen=frozen)]

    @classmethod
    def needs(cls, own: LoRAConfig, model: PreTrainedModel, before: Needs) -> Needs:
        """Needs of the adapters, which alone learn; the blocks may be quantised to four bits."""
        with torch.device("meta"):
            added = sum(p.numel() for p in add_adapters(model, own, 0))
        return replace(
            before,
            names=set(),
            added=added,
            lowest=0,
            block_itemsize=None if own.quantize is None else NF4_ITEMSIZE,
            frozen_as_multiplied=own.quantize is None,
            added_to=lambda built, device: _adapt(built, own, device),
        )

    @classmethod
    def source_name(cls, own: LoRAConfig, name: str) -> str | None:
        """The name of the adapted matrix without the adapter's part; None for adapters, which are new."""
        return base_name(name)

    @classmethod
    def weights(cls, own: LoRAConfig, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The model's weights with the adapters merged into the adapted matrices."""
        return AdaptedWeights(stored, own)


def _adapt(model: PreTrainedModel, config: LoRAConfig, device: str) -> None:
    """Add adapters whose dropout keeps the same tensors for the backward pass as on the device: on GPUs, a mask."""
    add_adapters(model, config, 0)
    for module in model.modules():
        if device == "cuda" and isinstance(module, nn.Dropout):
            module.forward = lambda x, p=module.p: torch.native_dropout(x, p, True)[0]  # type: ignore[method-assign, misc]
