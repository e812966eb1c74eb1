"""The run's metrics as JSON lines."""

import json
from pathlib import Path
from typing import Any

from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from llmprune.checkpoints.metrics import read_metrics
from llmprune.utils.files import write_text


class MetricsFile(LoggerDestination):
    """Writes ``metrics.jsonl``: lines of {"batch": n, metric: value, …}, by rank 0.

    A batch has one line, and one more line for each evaluation or checkpoint after it. A resumed run removes the lines
    of batches that it repeats.
    """

    def __init__(self, path: Path) -> None:
        """Set the path of the file."""
        self._path = path
        self._active = dist.get_global_rank() == 0
        self._line: dict[str, Any] = {}

    def after_load(self, state: State, logger: Logger) -> None:
        """Keep only the lines before the batch that the run resumes at."""
        if self._active and self._path.exists():
            lines = read_metrics(self._path)
            now = state.timestamp.batch.value
            # The line of an evaluation has the number of the batch after it.
            kept = [
                line for line in lines if line["batch"] < now or (line["batch"] == now and "time/batch" not in line)
            ]
            write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Add metrics to the line of batch ``step``; the first metric of a new batch writes the previous line."""
        if not self._active:
            return
        if step is not None and step != self._line.get("batch"):
            self._write()
            self._line = {"batch": step}
        for name, value in metrics.items():
            number = float(value)
            self._line[name] = int(number) if isinstance(value, int) else number

    def close(self, state: State, logger: Logger) -> None:
        """Write the last line."""
        self._write()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Write to disk what was logged before a checkpoint: a run that resumes from it does not log it again."""
        now = state.timestamp.batch
        if any(isinstance(saver, CheckpointSaver) and saver.last_checkpoint_batch == now for saver in state.callbacks):
            self._write()

    def eval_after_all(self, state: State, logger: Logger) -> None:
        """Write the line of an evaluation to disk at once."""
        self._write()

    def _write(self) -> None:
        if self._active and len(self._line) > 1:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(self._line) + "\n")
        self._line = {key: value for key, value in self._line.items() if key == "batch"}
