"""Training only some of a model's weights, and others later, as a Composer callback."""

from typing import cast

import torch
from composer.core import Callback, State, TimeUnit
from composer.loggers import Logger
from torch.nn.parallel import DistributedDataParallel

from llmprune.models.causal_lm import ComposerCausalLM
from llmprune.models.parameters import init_optimizer_state, plain_name, train_only
from llmprune.recovery.trainable import Phase, TrainableConfig, phases


class PartialTraining(Callback):
    """Trains the weights that its settings name; all others remain unchanged, bit for bit.

    The optimiser gets all weights that train in any phase. Weights that do not train in the current phase need neither
    a gradient nor an optimiser step.
    """

    def __init__(self, config: TrainableConfig) -> None:
        """Store the settings.

        Raises:
            UserError: a setting is impossible.
        """
        config.check()
        self.config = config
        self._phases: list[Phase]
        self._names: list[str]

    def init(self, state: State, logger: Logger) -> None:
        """Freeze the weights that never train, before the model is sharded."""
        model = cast(ComposerCausalLM, state.model)
        self._phases = phases(model.model, self.config.parameters, self.config.later)
        ever = frozenset[str]().union(*(phase.names for phase in self._phases))
        self._names = [name for name, _ in model.model.named_parameters() if name in ever]
        train_only(model, state.optimizers, [model.model.get_parameter(name) for name in self._names])
        trained = sum(model.model.get_parameter(name).numel() for name in self._names)
        logger.log_hyperparameters({"trainable/parameters": trained})

    def before_load(self, state: State, logger: Logger) -> None:
        """Create the optimizer state of all weights that train in any phase."""
        if len(self._phases) > 1:
            for optimizer in state.optimizers:
                init_optimizer_state(optimizer)

    def before_train_batch(self, state: State, logger: Logger) -> None:
        """Freeze and unfreeze weights for the current phase."""
        names = self._now(state)
        for name, parameter in self._parameters(state).items():
            # A data-parallel model waits for the gradients of all parameters that required one when it was wrapped.
            parameter.requires_grad_(name in names or isinstance(state.model, DistributedDataParallel))

    def after_backward(self, state: State, logger: Logger) -> None:
        """Drop the gradients of weights that do not train in the current phase."""
        names = self._now(state)
        for name, parameter in self._parameters(state).items():
            if name not in names:
                parameter.grad = None

    def _now(self, state: State) -> frozenset[str]:
        names = self._phases[0].names
        for phase in self._phases[1:]:
            if phase.start.unit == TimeUnit.DURATION:
                elapsed = state.get_elapsed_duration()
                now = 0.0 if elapsed is None else elapsed.value
            else:
                now = state.timestamp.get(phase.start.unit).value
            names = phase.names if now >= phase.start.value else names
        return names

    def _parameters(self, state: State) -> dict[str, torch.nn.Parameter]:
        model = cast(ComposerCausalLM, getattr(state.model, "module", state.model)).model
        named = ((plain_name(name), p) for name, p in model.named_parameters())
        return {name: parameter for name, parameter in named if name in self._names}
