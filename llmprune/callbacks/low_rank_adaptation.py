"""Low-rank adapters as a Composer callback."""

from typing import cast

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llmprune.data.order import keyed_generator
from llmprune.models.causal_lm import ComposerCausalLM
from llmprune.models.parameters import train_only
from llmprune.recovery.lora import LoRAConfig, add_adapters, hold_frozen
from llmprune.utils.settings import check_settings


class LowRankAdaptation(Callback):
    """Trains adapters beside a model's matrices; no other weights train.

    Dropout of the adapters' inputs uses the random key (seed, batch, microbatch, rank), so a resumed run drops the same
    values.
    """

    def __init__(self, config: LoRAConfig, *, seed: int, frozen: torch.dtype | None = None) -> None:
        """Store the settings.

        Args:
            config: settings of the adapters.
            seed: seed of the adapters and of dropout.
            frozen: dtype in which the blocks' frozen matrices are held; None = as they are.

        Raises:
            UserError: a setting is out of range.
        """
        check_settings(config, "lora")
        self.config, self._seed, self._frozen, self._microbatch = config, seed, frozen, 0

    def init(self, state: State, logger: Logger) -> None:
        """Add the adapters to the model, before it is sharded."""
        model = cast(ComposerCausalLM, state.model)
        adapters = add_adapters(model.model, self.config, self._seed)
        train_only(model, state.optimizers, adapters)
        if self._frozen is not None:
            hold_frozen(model.model, self._frozen)
        if state.fsdp_config is None:  # with sharding, the shards are moved later, adapters included
            state.device.module_to_device(model)
        logger.log_hyperparameters({"trainable/parameters": sum(parameter.numel() for parameter in adapters)})

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Reset the microbatch count for a new batch."""
        self._microbatch = 0

    def before_forward(self, state: State, logger: Logger) -> None:
        """Set the random seed of the microbatch, which only dropout uses."""
        if self.config.dropout:
            key = (self._seed, state.timestamp.batch.value, self._microbatch, dist.get_global_rank())
            torch.manual_seed(int(keyed_generator(*key).integers(2**63)))
            self._microbatch += 1
