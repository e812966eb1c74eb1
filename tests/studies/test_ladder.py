"""The ladder's cells and its table."""

import math
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmprune.utils.files import write_json

LADDER = Path(__file__).parents[2] / "studies" / "ladder"
MODULES = ("cells", "measures", "results", "work")


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ladder's modules can be imported, in these tests only."""
    monkeypatch.syspath_prepend(LADDER)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def test_cells_are_made_of_cells() -> None:
    cells: dict[str, Any] = runpy.run_path(str(LADDER / "cells.py"))["ladder"]()
    parents = {cell.parent for cell in cells.values()} - {None}
    assert parents
    assert parents <= set(cells)
    results = runpy.run_path(str(LADDER / "results.py"))
    for name, cell in cells.items():
        assert results["parent_of"](name) == (cell.parent or name)


def test_cuts_keep_to_their_size() -> None:
    """Parameters of SmolLM2-135M by hand: embedding and last norm, and of a block attention, norms and channels."""
    cells = runpy.run_path(str(LADDER / "cells.py"))
    attention, norms, channel, outside, whole = 884_736, 1_152, 3 * 576, 576 * (49_152 + 1), 134_515_008
    sizes = []
    for share, gone in cells["BLOCKS"].items():
        sizes.append((share, outside + (30 - gone) * (attention + norms + 1_536 * channel)))
    for share, channels in cells["CHANNELS"].items():
        sizes.append((share, outside + 30 * (attention + norms + channels * channel)))
    for share, mixes in cells["MIXED"].items():
        for gone, channels in mixes.items():
            sizes.append((share, outside + (30 - gone) * (attention + norms + channels * channel)))
    for share, mixes in cells["FEWER_TOKENS"].items():
        for gone, channels in mixes.items():
            saved = 576 * (49_152 - cells["VOCABULARY"])
            sizes.append((share, outside - saved + (30 - gone) * (attention + norms + channels * channel)))
    for share, (attentions, channels) in cells["TWO_STAGES"].items():
        sizes.append((share, outside + attentions * attention + 30 * (norms + channels * channel)))
    for share, parameters in sizes:
        assert 0.96 * float(share) <= parameters / whole <= float(share), (share, parameters)


def test_the_table_counts_all_tokens_and_the_nats_won_back(tmp_path: Path) -> None:
    found = runpy.run_path(str(LADDER / "results.py"))
    facts = {"parameters": 99_000_000, "seconds": 1.0, "wikitext_2048": 20.0, "domains": {"code": 3.0, "packages": 9.0}}
    known = {
        "source": {**facts, "tokens": 0, "wikitext_512": 20.0},
        "blocks/0.75/taylor": {**facts, "tokens": 100, "wikitext_512": 20.0 * math.exp(2.0)},
        "recovered/0.05M/blocks/0.75/taylor/KL": {**facts, "tokens": 50, "wikitext_512": 20.0 * math.exp(0.5)},
    }
    write_json(tmp_path / "results.json", known)
    found["table"].__globals__["RESULTS"] = tmp_path / "results.json"
    rows = found["table"](known).splitlines()[2:]
    assert [row.split(" | ")[2] for row in rows] == ["0", "100", "150"]
    assert {row.split(" | ")[8].rstrip(" |") for row in rows} == {"3.000"}
    assert [row.split(" | ")[6:8] for row in rows] == [["0.000", ""], ["2.000", ""], ["0.500", "75%"]]


def test_the_tables_of_a_page_are_made_anew(tmp_path: Path) -> None:
    found = runpy.run_path(str(LADDER / "results.py"))
    facts = {
        "parameters": 99_000_000,
        "seconds": 1.0,
        "wikitext_512": 9.0,
        "wikitext_2048": 20.0,
        "domains": {"code": 3.0, "packages": 9.0},
    }
    write_json(tmp_path / "results.json", {name: {**facts, "tokens": 7} for name in ("source", "a b/1", "a b/2", "c")})
    found["refreshed"].__globals__["RESULTS"] = tmp_path / "results.json"
    page = "One.\n\n<!-- cells: source 'a b/*' -->\n\n| old |\n|---|\n\nTwo.\n\n<!-- cells: c -->\n\nThree.\n"
    names = ["source", "a b/1", "a b/2", "c"]
    new = found["refreshed"](page, names)
    first, second = (found["table"](some) for some in (names[:3], ["c"]))
    head, rest = "One.\n\n<!-- cells: source 'a b/*' -->\n\n", "\n\nTwo.\n\n<!-- cells: c -->\n\n"
    assert new == f"{head}{first}{rest}{second}\n\nThree.\n" == found["refreshed"](new, names)


def test_the_tables_of_the_docs_are_those_of_the_results() -> None:
    cells, results = (runpy.run_path(str(LADDER / f"{name}.py")) for name in ("cells", "results"))
    page = (LADDER.parents[1] / "docs" / "ladder.md").read_text(encoding="utf-8")
    assert "<!-- cells: " in page and results["refreshed"](page, [*cells["ladder"]()]) == page
