"""Weights of domains that follow their evaluation losses, as a Composer callback."""

import logging
import math
from collections.abc import Collection
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llmprune.data.dataset import MixedDataset
from llmprune.data.mixing import integer_weights
from llmprune.data.weight_updates import NEEDS_LOSSES, DynamicLoadingConfig, Measured, drawable, new_weights

log = logging.getLogger(__name__)


class DynamicLoading(Callback):
    """Announces new weights of the domains after every evaluation, and logs what has been read.

    The weights are computed on rank 0 from losses that are equal on all ranks. They take effect ``update_delay``
    batches later, on all ranks and in all loader workers at the same sample.
    """

    def __init__(self, config: DynamicLoadingConfig | None, dataset: MixedDataset, evaluated: Collection[str]) -> None:
        """Store the settings.

        Args:
            config: settings of the section; None = only log what has been read.
            dataset: training stream.
            evaluated: domains whose losses are measured; if losses decide, the other domains keep their weights.
        """
        self._config, self._dataset = config, dataset
        self._held = set()
        if config is not None and config.update in NEEDS_LOSSES:
            self._held = {name for name, weight in dataset.weights.items() if weight} - set(evaluated)
        if self._held:
            log.warning(
                "without evaluation samples, these domains keep their weights: %s", ", ".join(sorted(self._held))
            )
        self._updated_at: int | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Log the initial weights."""
        if state.timestamp.batch.value == 0:
            logger.log_metrics({f"mixing/weight/{name}": value for name, value in self._dataset.weights.items()})

    def eval_end(self, state: State, logger: Logger) -> None:
        """Announce and log weights, at most once per batch number."""
        batch = state.timestamp.batch.value
        if batch == self._updated_at:
            return
        self._updated_at = batch
        metrics: dict[str, Any] = {}
        for kind, values in (
            ("samples", self._dataset.samples_seen(batch)),
            ("epochs", self._dataset.epochs_seen(batch)),
        ):
            metrics |= {f"mixing/{kind}/{name}": value for name, value in values.items()}
        if self._config is not None:
            metrics |= self._update(self._config, state, batch)
        logger.log_metrics(metrics)

    def _update(self, config: DynamicLoadingConfig, state: State, batch: int) -> dict[str, float]:
        domains, now = self._dataset.domains, self._dataset.weights
        references = config.references or {}
        losses = {name: float(state.eval_metric_values.get(f"loss/{name}", math.nan)) for name in domains}
        excess = {name: losses[name] - references.get(name, math.nan) for name in domains}
        elapsed = state.get_elapsed_duration()
        measured = Measured(list(now.values()), list(excess.values()), 0.0 if elapsed is None else elapsed.value)
        found = new_weights(measured, config, domains, self._held)
        parts = [None if found is None else integer_weights(drawable(found))]
        dist.broadcast_object_list(parts)
        metrics = {f"mixing/excess/{name}": value for name, value in excess.items() if math.isfinite(value)}
        if parts[0] is None:
            shown = ", ".join(f"{name} {value:g}" for name, value in losses.items())
            log.warning("no finite weights follow from the losses %s: the weights of domains stay as they are", shown)
            return metrics | {"mixing/skipped_updates": 1.0}
        self._dataset.change_weights(parts[0], batch + config.update_delay)
        return metrics | {f"mixing/weight/{name}": value for name, value in self._dataset.weights.items()}

    def state_dict(self) -> dict[str, Any]:
        """The batch of the last announcement; the stream's state contains the weights."""
        return {"updated_at": self._updated_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state."""
        self._updated_at = state["updated_at"]
