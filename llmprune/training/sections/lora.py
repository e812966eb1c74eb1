"""``lora``: adapters of low rank."""

import importlib.util
from collections.abc import Iterable, Mapping

import torch
from composer import Callback
from torch import Tensor
from transformers import PreTrainedModel

from llmprune.callbacks.low_rank_adaptation import LowRankAdaptation
from llmprune.config.sections import SECTIONS
from llmprune.estimate.sizes import Learning
from llmprune.recovery.lora import AdaptedWeights, LoRAConfig, add_adapters, lora_targets
from llmprune.training.section import Build, Inputs, Section
from llmprune.utils.errors import UserError


@SECTIONS.register("lora")
class LoRASection(Section[LoRAConfig]):
    """Adapters of low rank beside frozen matrices."""

    name = "lora"
    settings = LoRAConfig
    places = ()
    fixed = ("rank", "alpha", "dropout", "targets", "quantize")
    decides = ("train.microbatch_size",)  # dropout depends on it
    chooses_weights = True

    def check(self, inputs: Inputs) -> None:
        """See that the model has such matrices, and that they can be held so."""
        own, config = self.own, self.config
        lora_targets(inputs.model_config, own.targets)
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

    def callbacks(self, build: Build) -> Iterable[Callback]:
        """``LowRankAdaptation``."""
        return [LowRankAdaptation(self.own, seed=self.config.run.seed)]

    @classmethod
    def learning(cls, own: LoRAConfig, model: PreTrainedModel, before: Learning) -> Learning:
        """The adapters alone."""
        with torch.device("meta"):
            return Learning(set(), sum(p.numel() for p in add_adapters(model, own, 0)), lowest=0)

    @classmethod
    def weights(cls, own: LoRAConfig, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Adapters are merged into the matrices beside them."""
        return AdaptedWeights(stored, own)
