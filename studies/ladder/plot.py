"""The ladder as a picture: nats lost against parameters, speed and tokens."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from results import lost, parent_of, results, speed_of, tokens_of

SHOWN = 2.5  # nats; cells that lost more are left out
MOST_TOKENS = 600_000, 150_000  # a cell that took more than these tokens has a larger marker, one of less a smaller one
SIZES = 60, 30, 14  # of markers, in square points


def picture(names: Sequence[str], path: Path) -> None:
    """Draw the named cells that are known, a colour for each kind of cut; models that were not recovered are hollow."""
    found = results()
    source = found["source"]
    cells = [name for name in names if name in found and name != "source" and lost(name, found) < SHOWN]
    kinds = list(dict.fromkeys(parent_of(name).split("/")[0] for name in cells))
    panels = (
        ("parameters, share of the source's", {c: found[c]["parameters"] / source["parameters"] for c in cells}),
        ("tokens per second, times the source's (batch 1)", {c: speed_of(c, found) for c in cells}),
        ("tokens, for scores and recovery", {c: tokens_of(c, found) for c in cells}),
    )
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    for place, (title, values) in enumerate(panels):
        axes = figure.add_subplot(1, 3, place + 1, xlabel=title, yscale="log")
        axes.set_ylabel("nats per token lost (WikiText-2, segments of 512)" if not place else "")
        axes.grid(alpha=0.3, which="both")
        if values is panels[-1][1]:
            axes.set_xscale("log")
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
