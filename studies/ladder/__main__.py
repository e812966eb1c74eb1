"""Ways to prune and to recover the built-in model, side by side: the losses of each, measured alike.

    python studies/prose.py --out runs/ladder/text/prose
    python studies/encyclopedia.py --out runs/ladder/text-encyclopedia/encyclopedia
    python studies/ladder --wikitext WIKITEXT [--tasks FOLDER] [CELL…]        what is missing is made and measured
    python studies/ladder --speeds [CELL…]                                    speeds of cuts, on a quiet machine
    python studies/ladder --table [CELL…]                                     the table of what is there
    python studies/ladder --page docs/ladder.md                               the tables of a page, made anew
    python studies/ladder --plot FILE [CELL…]                                 a picture

WIKITEXT is WikiText-2's test file, FOLDER has the lm-eval tasks piqa_local, arc_easy_local and openbookqa_local. CELL
is a pattern such as ``'blocks/0.75/*'``; a model that is needed for others is made with them. Calibration and recovery
see the built-in corpus and, if it is there, prose; no WikiText. The encyclopedia is for some recoveries only.

Each cell is a model. It is made in a process of its own, and what was measured of it is kept in
studies/ladder/results.json. Cells that are there are not made again.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cells import Cell, ladder
from measures import perplexities, speeds, tasks
from plot import picture
from results import chosen, keep, refreshed, results, table
from work import Work

from llmprune.utils.files import read_json, write_json, write_text
from llmprune.utils.outputs import remove

LIMIT = 3 * 3600  # seconds of a cell


def make(cell: Cell, cells: dict[str, Cell], work: Work) -> dict[str, Any]:
    """Make the model of a cell, unless it is there; tokens and seconds that it took."""
    folder = work.cell(cell.name)
    known = folder / "made.json"
    if not known.exists():
        if cell.parent is not None:
            make(cells[cell.parent], cells, work)
        remove(folder / "model")
        folder.mkdir(parents=True, exist_ok=True)
        work.scores(cell.calibration)  # not in the cell's time
        start = time.perf_counter()
        tokens = cell.make(work, folder / "model")
        write_json(known, {"tokens": tokens, "seconds": time.perf_counter() - start})
    return dict(read_json(known))


def do(cell: Cell, cells: dict[str, Cell], work: Work, arguments: argparse.Namespace) -> None:
    """Make a cell, measure what is not known of it, and keep that."""
    facts = {**make(cell, cells, work), **results().get(cell.name, {})}
    model = work.cell(cell.name) / "model"
    if "wikitext_512" not in facts:
        kept = work.kept(cell.name) or work.kept(cell.parent)
        facts |= perplexities(model, work, arguments.wikitext, kept)
    if arguments.tasks is not None and "tasks" not in facts:
        facts |= tasks(model, arguments.tasks, arguments.questions)
    keep(cell.name, facts)
    if not any(other.parent == cell.name for other in cells.values()):
        remove(work.cell(cell.name))


def timed(cells: list[Cell], known: dict[str, Cell], work: Work) -> None:
    """Measure the speed of some cells in turns with the source, and keep it."""
    for cell in cells:
        make(cell, known, work)
    models = [work.cell(cell.name) / "model" for cell in cells]
    for cell, facts in zip(cells, speeds([work.model, *models]), strict=True):
        keep(cell.name, {**results()[cell.name], **facts})


def is_known(name: str, arguments: argparse.Namespace) -> bool:
    """Whether everything that is asked for was measured of a cell."""
    facts = results().get(name, {})
    return "wikitext_512" in facts and (arguments.tasks is None or "tasks" in facts)


def main() -> None:
    """Make and measure what is missing, each cell in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", default=["*"], metavar="CELL", help="patterns of names")
    parser.add_argument("--out", type=Path, default=Path("runs/ladder"), help="folder of models and data")
    parser.add_argument("--wikitext", help="WikiText-2's test file")
    parser.add_argument("--tasks", help="folder with task files; none = no tasks")
    parser.add_argument("--questions", type=int, default=300, help="of each task")
    parser.add_argument("--table", action="store_true", help="print what is known")
    parser.add_argument("--page", type=Path, help="make the tables of this Markdown file anew")
    parser.add_argument("--plot", type=Path, help="draw what is known to this file")
    parser.add_argument("--speeds", action="store_true", help="measure the speed of the named cuts")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cells, work = ladder(), Work(arguments.out)
    names = chosen(cells, arguments.cells)
    if arguments.list:
        print("\n".join(names))
    elif arguments.table:
        print(table(names))
    elif arguments.page:
        write_text(arguments.page, refreshed(arguments.page.read_text(encoding="utf-8"), [*cells]))
    elif arguments.plot:
        picture(names, arguments.plot)
    elif arguments.speeds:
        timed([cells[name] for name in names if name in results()], cells, work)
    elif arguments.one:
        do(cells[names[0]], cells, work, arguments)
    else:
        if arguments.wikitext is None:
            parser.error("--wikitext is missing")
        arguments.out.mkdir(parents=True, exist_ok=True)
        given = [word for word in sys.argv[1:] if word not in arguments.cells]
        for place, name in enumerate(missing := [name for name in names if not is_known(name, arguments)]):
            start = time.perf_counter()
            command = [sys.executable, __file__, *given, "--one", name]
            with (arguments.out / "log.txt").open("a") as log:
                try:
                    subprocess.run(command, stdout=log, stderr=log, timeout=LIMIT, check=True)
                    what = f"perplexity {results()[name]['wikitext_512']:.1f}"
                except subprocess.SubprocessError as error:
                    what = str(error)
            print(f"{place + 1} of {len(missing)}: {name}: {what}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
