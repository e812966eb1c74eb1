"""``train.py``, noting what it trains on; the repository must be on PYTHONPATH.

``composer [-n RANKS] tests/harness/recorded_run.py FOLDER YAML [section.key=value …]``
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import train
from llmprune.utils.processes import end_with_launcher

if TYPE_CHECKING:
    from composer import Callback
    from composer.core import State
    from composer.loggers import Logger


def recorder() -> "type[Callback]":
    """The callback that appends a line to FOLDER/rank-RANK.jsonl when something begins.

    A line is {"event": "batch", "evaluation" or "checkpoint", "batch": batches that are done}; that of a batch also has
    "samples": a digest of every sample of this rank, in order. It is with the system at once: a kill loses none.
    """
    from composer import Callback  # what takes seconds to import comes after the launcher is watched
    from composer.utils import dist

    class Record(Callback):
        def __init__(self, folder: str) -> None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._path = Path(folder) / f"rank-{dist.get_global_rank()}.jsonl"

        def batch_start(self, state: "State", logger: "Logger") -> None:
            rows = zip(state.batch["domain"].tolist(), state.batch["input_ids"].tolist(), strict=True)
            self._note("batch", state, samples=[hashlib.sha256(repr(row).encode()).hexdigest()[:16] for row in rows])

        def eval_start(self, state: "State", logger: "Logger") -> None:
            self._note("evaluation", state)

        def batch_checkpoint(self, state: "State", logger: "Logger") -> None:
            self._note("checkpoint", state)

        def _note(self, event: str, state: "State", **more: Any) -> None:
            with self._path.open("a") as file:
                file.write(json.dumps({"event": event, "batch": state.timestamp.batch.value, **more}) + "\n")

    return Record


def main() -> int:
    """Record and train."""
    end_with_launcher()
    from llmprune.callbacks.registered import CALLBACKS

    CALLBACKS.register("record")(recorder())
    folder = json.dumps(sys.argv[1])
    return train.main([*sys.argv[2:], f"callbacks={{record: {{folder: {folder}}}}}"])


if __name__ == "__main__":
    sys.exit(main())
