"""A plan drawn as a picture of the model: what of every block stays."""

from collections.abc import Sequence
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from llmprune.plans.plan import Plan
from llmprune.reporting.figures import STYLE, Picture

CELLS = 64  # at most so many cells stand for heads, channels or hidden dimensions
KEPT = LinearSegmentedColormap.from_list("kept", [(0.5, 0.5, 0.5, 0.18), (0.18, 0.49, 0.85, 1.0)])


def picture_of_plan(plan: Plan, name: str) -> Picture:
    """Blocks × heads and blocks × channels, and the hidden dimensions; the darker a cell, the more of it stays."""
    source = plan.source
    heads, channels = (np.zeros((source.layers, size)) for size in (source.heads, source.intermediate))
    for block in plan.blocks:
        for number, weight in block.merge or ((None, 0.0),):
            if number is not None and weight:
                heads[number], channels[number] = 0.5, 0.5  # goes into the sum
        heads[block.attention, list(plan.heads(block))] = 1
        channels[block.mlp, list(plan.channels(block))] = 1
    hidden = np.zeros((1, source.hidden))
    hidden[0, list(range(source.hidden)) if plan.hidden is None else list(plan.hidden)] = 1

    with mpl.rc_context(STYLE):
        height = max(0.16 * source.layers, 1.2)
        figure = Figure(figsize=(5.0, height + 1.3), layout="constrained")
        above, below = cast(Any, figure.subfigures(2, 1, height_ratios=[0.75, height + 0.4]))
        strip = above.add_subplot()
        strip.imshow(_cells(hidden), aspect="auto", cmap=KEPT, vmin=0, vmax=1, interpolation="nearest")
        strip.set_title(f"hidden dimensions: {int(hidden.sum())} of {source.hidden}", fontsize=9)
        strip.set_xticks([])
        strip.set_yticks([])
        panels = below.subplots(1, 2, sharey=True)
        shape = plan.shape
        for axes, values, title in (
            (panels[0], heads, f"heads: {shape.heads} of {source.heads}"),
            (panels[1], channels, f"channels: {shape.intermediate} of {source.intermediate}"),
        ):
            axes.imshow(_cells(values), aspect="auto", cmap=KEPT, vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(title, fontsize=9)
            axes.set_xticks([])
            axes.set_yticks(range(0, source.layers, 1 if source.layers <= 40 else 4))
            axes.tick_params(labelsize=7)
        panels[0].set_ylabel("block")
    rows = [
        {"block": number, "heads": int((heads[number] == 1).sum()), "channels": int((channels[number] == 1).sum())}
        for number in range(source.layers)
    ]
    title = f"{name}: {len(plan.blocks)} of {source.layers} blocks"
    return Picture(f"{name}-plan", title, figure, rows)


def _cells(values: np.ndarray) -> Sequence[Sequence[float]]:
    """Columns put together to at most ``CELLS``, each the mean of what it stands for."""
    parts = np.array_split(values, min(CELLS, values.shape[1]), axis=1)
    return np.stack([part.mean(1) for part in parts], axis=1)
