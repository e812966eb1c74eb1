"""The ladder as a picture: nats lost against parameters, speed and tokens."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter
from results import lost, parent_of, results, speed_of, tokens_of

SHOWN = 2.5  # nats; cells that lost more are left out
MOST_TOKENS = 600_000, 150_000  # a cell that took more than these tokens has a larger marker, one of less a smaller one
SIZES = 60, 30, 14  # of markers, in square points
NATS, TOKENS = (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2), (2e4, 5e4, 1e5, 2e5, 5e5, 1e6)  # labels of the axes


def picture(names: Sequence[str], path: Path) -> None:
    """Draw the named cells that are known, a colour for each kind of cut; models that were not recovered are hollow."""
    found = results()
    source = found["source"]
    cells = [name for name in names if name in found and name != "source" and lost(name, found) < SHOWN]
    kinds = list(dict.fromkeys(parent_of(name).split("/")[0] for name in cells))
    panels: tuple[tuple[str, dict[str, float | None]], ...] = (
        ("parameters, share of the source's", {c: found[c]["parameters"] / source["parameters"] for c in cells}),
        ("tokens per second, times the source's (batch 1)", {c: speed_of(c, found) for c in cells}),
        ("tokens, for scores and recovery", {c: tokens_of(c, found) for c in cells}),
    )
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True)
    row[0].set(ylabel="nats per token lost (WikiText-2, segments of 512)", yscale="log")
    row[0].yaxis.set_major_locator(FixedLocator(NATS))
    row[0].yaxis.set_major_formatter("{x:g}")
    row[0].yaxis.set_minor_formatter(NullFormatter())
    row[-1].set_xscale("log")
    row[-1].xaxis.set_major_locator(FixedLocator(TOKENS))
    row[-1].xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g} M")
    row[-1].xaxis.set_minor_formatter(NullFormatter())
    for axes, (title, values) in zip(row, panels, strict=True):
        axes.set_xlabel(title)
        axes.grid(alpha=0.3, which="both")
        for number, kind in enumerate(kinds):
            for cell, x in values.items():
                if x is None or parent_of(cell).split("/")[0] != kind:
                    continue
                tokens, colour = tokens_of(cell, found), f"C{number}"
                size = SIZES[sum(tokens < least for least in MOST_TOKENS)]
                trained = cell.startswith("recovered/") or kind in ("gates", "rounds")
                face = colour if trained else "none"
                axes.scatter(x, lost(cell, found), size, facecolors=face, edgecolors=colour)
    handles = [figure.axes[0].scatter([], [], 30, color=f"C{number}", label=kind) for number, kind in enumerate(kinds)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(kinds), frameon=False)
    figure.savefig(path, dpi=110)
