"""The steps of a long command in one folder: each is done once, and a stopped command goes on with the next."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from composer.utils import dist

from llmprune.measurement.monitor import return_memory
from llmprune.utils.files import read_json, write_json
from llmprune.utils.logs import tell
from llmprune.utils.ranks import on_rank_zero


class Steps:
    """The steps in a folder, with the seconds that each took, in ``steps.json``."""

    def __init__(self, folder: Path) -> None:
        """Read which steps are done; ``folder`` is claimed by this command."""
        self._known = folder / "steps.json"
        self.seconds: dict[str, float] = read_json(self._known) if self._known.is_file() else {}

    def alone(self, name: str, result: Path, work: Callable[[], Any]) -> None:
        """Run a step on rank 0, unless its result exists; see ``together``."""
        self.together(name, result, lambda: on_rank_zero(lambda: work() and None))

    def together(self, name: str, result: Path, work: Callable[[], Any]) -> None:
        """Run a step on all ranks, unless its result exists.

        Args:
            name: words for the step.
            result: file or folder that the step writes last, and as a whole.
            work: function that does the step.
        """
        if on_rank_zero(result.exists):
            self._show(f"{name}: done before, {_near(result)}")
            return
        self._show(f"{name} …")
        start = time.perf_counter()
        work()
        return_memory()
        self.seconds[name] = round(time.perf_counter() - start, 1)
        on_rank_zero(lambda: write_json(self._known, self.seconds))
        self._show(f"{name}: {self.seconds[name]:,.0f} s, {_near(result)}")

    @staticmethod
    def _show(line: str) -> None:
        if dist.get_global_rank() == 0:
            tell(f"prune: {line}")


def _near(path: Path) -> Path:
    """The path from the working directory on, if it is in it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
