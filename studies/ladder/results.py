"""What is known of the cells: the file that is kept, and its table."""

import math
import re
import shlex
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from llmprune.utils.files import read_json, write_json

TABLE = re.compile(r"(<!-- cells: (.+) -->\n\n)((?:\|.*\n)*)")  # a comment with patterns, and the table below it
TASKS = {"piqa_local": "piqa", "arc_easy_local": "arc_easy", "openbookqa_local": "openbookqa"}
RESULTS = Path(__file__).resolve().with_name("results.json")


def results() -> dict[str, dict[str, Any]]:
    """What is known of the cells, by name."""
    return read_json(RESULTS) if RESULTS.exists() else {}


def keep(name: str, facts: dict[str, Any]) -> None:
    """Keep what is known of a cell."""
    write_json(RESULTS, dict(sorted({**results(), name: facts}.items())))


def parent_of(name: str) -> str:
    """The cell that a recovered one began with; of others, their own name."""
    return name.split("/", 2)[2].rpartition("/")[0] if name.startswith("recovered/") else name


def tokens_of(name: str, found: dict[str, dict[str, Any]]) -> int:
    """The tokens that a model took from the source on: to score, to cut and to recover."""
    before = found.get(parent_of(name), {}) if name.startswith("recovered/") else {}
    return int(found[name]["tokens"]) + int(before.get("tokens", 0))


def lost(name: str, found: dict[str, dict[str, Any]]) -> float:
    """Nats per token of WikiText-2, in segments of 512, that a model lost."""
    return math.log(found[name]["wikitext_512"]) - math.log(found["source"]["wikitext_512"])


def speed_of(name: str, found: dict[str, dict[str, Any]], batch: int = 1) -> float | None:
    """How many times as fast as the source a model generates; recovery changes nothing. None = not measured."""
    facts = found[name] if "faster" in found[name] else found.get(parent_of(name), {})
    return facts.get("faster", {}).get(str(batch))


def chosen(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match one of the patterns."""
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def refreshed(page: str, names: Sequence[str]) -> str:
    """A page whose tables are made anew: those below a comment such as ``<!-- cells: source 'blocks/0.9/*' -->``."""

    def anew(found: re.Match[str]) -> str:
        return f"{found[1]}{table(chosen(names, shlex.split(found[2])))}\n{'' if found[3] else chr(10)}"

    return TABLE.sub(anew, page)


def held_out(facts: dict[str, Any]) -> float:
    """Mean held-out loss of the domains but ``packages``, whose text depends on what else is installed."""
    losses = [loss for domain, loss in facts["domains"].items() if domain != "packages"]
    return sum(losses) / len(losses)


def table(names: Iterable[str]) -> str:
    """A row for every cell that is known; columns of speeds and tasks only if one is known."""
    found = results()
    names = [name for name in names if name in found]
    asked = TASKS if any("tasks" in found[name] for name in names) else {}
    timed = (1, 8) if any(speed_of(name, found) for name in names) else ()
    columns = (
        "model",
        "parameters, M",
        "tokens",
        "seconds",
        "WikiText-2, 512",
        "2,048",
        "nats lost",
        "won back",
        "held-out loss",
        *(f"times as fast, batch {batch}" for batch in timed),
        *asked.values(),
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in names:
        facts = found[name]
        parent = parent_of(name)
        known = parent != name and parent in found
        won = f"{1 - lost(name, found) / lost(parent, found):.0%}" if known else ""
        cells = (
            f"`{name}`",
            f"{facts['parameters'] / 1e6:.1f}",
            f"{tokens_of(name, found):,}",
            f"{facts['seconds']:.0f}",
            f"{facts['wikitext_512']:.1f}",
            f"{facts['wikitext_2048']:.1f}",
            f"{lost(name, found):.3f}",
            won,
            f"{held_out(facts):.3f}",
            *("" if (speed := speed_of(name, found, batch)) is None else f"{speed:.2f}" for batch in timed),
            *(f"{facts['tasks'][task]['acc_norm']:.2f}" if "tasks" in facts else "" for task in asked),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
