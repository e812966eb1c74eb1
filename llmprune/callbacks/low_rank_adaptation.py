"""Low-rank adapters as a Composer callback."""

from typing import cast

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llmprune.data.order import keyed_generator
from llmprune.models.causal_lm import ComposerCausalLM
from llmprune.models.parameters import train_only
from llmprune.recovery.lora import LoRAConfig, add_adapters
from llmprune.utils.settings import check_settings


class LowRankAdaptation(Callback):
    """Trains adapters beside a model's matrices, and nothing else.

    What is dropped of their inputs is keyed by (seed, batch, microbatch, rank), so that a resumed run drops the same.
    """

    def __init__(self, config: LoRAConfig, *, seed: int) -> None:
        """Prepare.

        Raises:
            UserError: a setting is out of range.
        """
        check_settings(config, "lora")
        self.config, self._seed, self._microbatch = config, seed, 0

    def init(self, state: State, logger: Logger) -> None:
        """Put the adapters on the model, before it is sharded."""
        model = cast(ComposerCausalLM, state.model)
        adapters = add_adapters(model.model, self.config, self._seed)
        train_only(model, state.optimizers, adapters)
        if state.fsdp_config is None:  # otherwise the shards are moved, adapters among them
            state.device.module_to_device(model)
        logger.log_hyperparameters({"trainable/parameters": sum(parameter.numel() for parameter in adapters)})

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Start a batch."""
        self._microbatch = 0

    def before_forward(self, state: State, logger: Logger) -> None:
        """Begin a microbatch's randomness, which dropout alone uses, anew."""
        if self.config.dropout:
            key = (self._seed, state.timestamp.batch.value, self._microbatch, dist.get_global_rank())
            torch.manual_seed(int(keyed_generator(*key).integers(2**63)))
            self._microbatch += 1
