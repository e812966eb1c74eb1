"""Reading the metrics that a run has logged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmprune.utils.errors import UserError
from llmprune.utils.files import parse_json


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; see ``read_lines``."""
    return read_lines(path, _numbers)


def read_lines(path: Path, parse: Callable[[str], dict[str, Any]] = parse_json) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines; empty if there is no file. An incomplete last line (a crash) is left out.

    Args:
        path: path of the file.
        parse: function that parses one line; it raises ``ValueError`` for a line that it can't read.

    Raises:
        UserError: another line is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(parse(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}:{number} is no line of metrics ({error}): take it out") from None
    return found


def _numbers(line: str) -> dict[str, Any]:
    values = parse_json(line, finite=False)
    if not isinstance(values, dict) or type(values.get("batch")) is not int:
        raise ValueError("it has no batch")
    if not all(isinstance(value, int | float) for value in values.values()):
        raise ValueError("a metric is no number")
    return values
