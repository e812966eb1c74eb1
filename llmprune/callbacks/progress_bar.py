"""The progress bar of a run, for those who print no metrics."""

from typing import Any

from composer.loggers import ProgressBarLogger


class ProgressBar(ProgressBarLogger):
    """Composer's, without a state: a resumed run does not need what a bar has shown.

    Composer keeps the bar's text and numbers in the checkpoint, where a sharded run that goes on looks for them before
    it has a bar, and fails.
    """

    def state_dict(self) -> dict[str, Any]:
        """No state: a resumed run begins a new bar."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is kept."""
