"""The evaluation loss of each domain, as a Composer callback."""

from collections.abc import Mapping

from composer.core import Callback, State
from composer.loggers import Logger, ProgressBarLogger

from llmprune.models.causal_lm import DomainLoss


class DomainLosses(Callback):
    """Logs ``metrics/eval/loss/DOMAIN`` after every evaluation, and adds them to the state's evaluation metrics.

    One metric object has the sums of all domains, so the cost per batch does not depend on the number of domains. The
    progress bar does not get these losses, because it would redraw for each of them. Place this callback before all
    callbacks that use these losses.
    """

    def __init__(self, domains: Mapping[int, str]) -> None:
        """Store the names of the domains by domain number; their losses are logged."""
        self._domains = dict(domains)

    def eval_end(self, state: State, logger: Logger) -> None:
        """Log the loss of every domain that was evaluated."""
        label = state.dataloader_label
        assert label is not None
        metric = state.eval_metrics[label]["loss"]
        assert isinstance(metric, DomainLoss)
        losses = {f"loss/{name}": metric.means[number] for number, name in self._domains.items()}
        state.eval_metric_values.update(losses)
        named = {f"metrics/{label}/{name}": loss for name, loss in losses.items()}
        for destination in logger.destinations:
            if not isinstance(destination, ProgressBarLogger):
                destination.log_metrics(named, state.timestamp.batch.value)
