"""The results of a search: a table and a figure of all candidates."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmprune.reporting.figures import STYLE, Picture

Row = Mapping[str, Any]
AXES = {"parameters": "million parameters", "latency": "share of the source's time of a token"}


def pareto_front(points: Iterable[tuple[float, float]]) -> list[int]:
    """The indices of the points on the Pareto front: no other point is as good in both numbers and better in one.

    Args:
        points: cost and loss of each candidate; smaller is better.
    """
    known = list(points)
    return [
        place
        for place, point in enumerate(known)
        if not any(other[0] <= point[0] and other[1] <= point[1] and other != point for other in known)
    ]


def fronts(rows: Sequence[Row]) -> dict[str, set[int]]:
    """The numbers of the recovered candidates on the Pareto front, by the kind of cost."""
    recovered = [row for row in rows if "recovered" in row]
    found = {}
    for axis in AXES:
        places = pareto_front((_cost(row, axis), row["recovered"]["loss"]) for row in recovered)
        found[axis] = {recovered[place]["number"] for place in places}
    return found


def search_table(rows: Sequence[Row]) -> str:
    """All candidates as a Markdown table, the best first."""
    lines = [
        "| decided by | what goes | parameters | memory, MB | latency | calibration loss | loss, recovered | front |",
        "|---|---|---|---|---|---|---|---|",
    ]
    on_front = fronts(rows)
    for row in sorted((row for row in rows if "impossible" not in row), key=_order):
        names = ", ".join(axis for axis, numbers in on_front.items() if row["number"] in numbers)
        known = row.get("measured_latency")
        predicted = "" if row["latency"] is None else f"{row['latency']:.3f}"
        latency = predicted + ("" if known is None else f" ({known:.3f} measured)")
        if "recovered" in row:
            after = f"{row['recovered']['loss']:.4f} (cut {row['cut']['loss']:.4f})"
        elif "failed" in row:
            after = "failed"
        elif row["same_as"] is not None:
            after = f"as {_words(rows, row['same_as'])}"
        else:
            after = "" if row["within"] else "over the budget"
        lines.append(
            f"| {row['decided_by']} | {row['goes']} | {row['parameters']:,} | {row['memory_bytes'] / 1e6:,.1f} | "
            f"{latency} | {_shown(row['calibration_loss'])} | {after} | {names} |"
        )
    lines += [f"| {row['decided_by']} | {row['impossible']} |||||||" for row in rows if "impossible" in row]
    return "\n".join(lines) + "\n"


@mpl.rc_context(STYLE)
def picture(rows: Sequence[Row]) -> Picture:
    """Draw the loss against the number of parameters and against latency.

    Open circles are calibration losses. Recovered candidates have two held-out losses: cut (open square) and recovered
    (full circle).
    """
    figure = Figure(figsize=(10, 4.2))
    possible = [row for row in rows if "impossible" not in row]
    on_front = fronts(rows)
    panels: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    for axes, (axis, label) in zip(panels, AXES.items(), strict=True):
        for row in possible:
            cost, before = _cost(row, axis), row["calibration_loss"]
            colour = "#2f7ed8" if row["within"] else "#b8b8b8"
            if "recovered" not in row:
                axes.plot(
                    cost, math.nan if before is None else before, "o", color=colour, fillstyle="none", markersize=5
                )
            else:
                before, after = row["cut"]["loss"], row["recovered"]["loss"]
                axes.plot(cost, before, "s", color=colour, fillstyle="none", markersize=5)
                axes.plot([cost, cost], [before, after], color=colour, linewidth=0.8, alpha=0.6)
                axes.plot(cost, after, "o", color="#e07b39" if row["number"] in on_front[axis] else colour)
                axes.annotate(row["number"], (cost, after), xytext=(5, -9), textcoords="offset points", fontsize=7)
        front = sorted((_cost(r, axis), r["recovered"]["loss"]) for r in possible if r["number"] in on_front[axis])
        axes.plot(*zip(*front, strict=True), color="#e07b39", drawstyle="steps-post", linewidth=1, label="Pareto front")
        axes.set_xlabel(label)
        axes.legend(loc="upper right")
        axes.margins(0.12)
    panels[0].set_ylabel("nats per token")
    kept = ("number", "decided_by", "parameters", "memory_bytes", "latency", "measured_latency", "calibration_loss")
    numbers = [
        {
            **{key: row.get(key) for key in kept},
            "cut_loss": row.get("cut", {}).get("loss"),
            "recovered_loss": row.get("recovered", {}).get("loss"),
        }
        for row in possible
    ]
    title = "Calibration loss of candidates (circles), held-out loss of the best as cut (squares) and recovered (full)"
    return Picture("search", title, figure, numbers)


def _cost(row: Row, axis: str) -> float:
    if axis == "parameters":
        return float(row["parameters"]) / 1e6
    known = row.get("measured_latency")
    known = row["latency"] if known is None else known
    return math.nan if known is None else float(known)


def _order(row: Row) -> tuple[float, float]:
    before = row["calibration_loss"]
    return row.get("recovered", {}).get("loss", math.inf), math.inf if before is None else before


def _shown(loss: float | None) -> str:
    return "no number" if loss is None or not math.isfinite(loss) else f"{loss:.4f}"


def _words(rows: Sequence[Row], number: int) -> str:
    return str(next(row["decided_by"] for row in rows if row["number"] == number))
