"""The progress bar of a run that prints no metrics to the console."""

from typing import Any

from composer.loggers import ProgressBarLogger


class ProgressBar(ProgressBarLogger):
    """Composer's progress bar without a state: a resumed run does not need the old bar's contents.

    Composer saves the bar's text and numbers in the checkpoint. A resumed sharded run looks for them before it has a
    bar, and fails.
    """

    def state_dict(self) -> dict[str, Any]:
        """An empty state: a resumed run begins a new bar."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore the state."""
