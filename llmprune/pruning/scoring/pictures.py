"""Pictures of scores: blocks by criteria, spans, and similarity of blocks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from llmprune.pruning.scoring.scores import Scores

COLOURS = "viridis"
LABELS = 16  # largest number of block numbers along an axis; more would overlap


def pictures_beside(out: Path | str) -> list[Path]:
    """The paths of the pictures that belong to a scores file."""
    return [Path(out).with_suffix(suffix) for suffix in (".png", ".spans.png", ".cka.png")]


@mpl.rc_context({"text.parse_math": False})  # names may contain $, which would start a formula
def draw_scores(scores: Scores, folder: Path | str, stem: str) -> list[Path]:
    """Draw the scores as PNG files in ``folder``.

    Args:
        scores: scores of a model.
        folder: folder that the files are written to.
        stem: first part of the files' names.

    Returns:
        The paths of the files: ``STEM.png`` (blocks × criteria), ``STEM.spans.png``, ``STEM.cka.png``, if there are
        scores to draw.
    """
    model = Path(scores.model).name
    rows = {**scores.blocks, **{f"{name} alone": values for name, values in scores.subblocks.items()}}
    drawn = []
    for name, figure in (
        (f"{stem}.png", heat_map(rows, f"{model}: importance by rank (0 goes first)") if rows else None),
        (f"{stem}.spans.png", span_landscape(scores.spans, model) if scores.spans else None),
        (f"{stem}.cka.png", similarity(scores.pairs["cka"], f"{model}: CKA") if "cka" in scores.pairs else None),
    ):
        if figure is not None:
            FigureCanvasAgg(figure)
            figure.savefig(Path(folder) / name, dpi=150, bbox_inches="tight")
            drawn.append(Path(folder) / name)
        else:
            (Path(folder) / name).unlink(missing_ok=True)  # a picture of earlier scores
    return drawn


def thinned(count: int) -> range:
    """The positions on an axis of ``count`` blocks that get a label: at most ``LABELS``, at round distances.

    >>> [*thinned(80)][:4]
    [0, 5, 10, 15]
    """
    steps = (step * 10**power for power in range(8) for step in (1, 2, 5))
    return range(0, count, next(step for step in steps if count <= LABELS * step))


def heat_map(rows: Mapping[str, Sequence[float]], title: str) -> Figure:
    """A picture of blocks × criteria, each criterion's scores as ranks from 0 (removed first) to 1.

    Ranks are used because one block far above the others (often the first) would leave no contrast among the rest.
    """
    names = list(rows)
    ranks = np.array([_ranks(rows[name]) for name in names])
    blocks = ranks.shape[1]
    figure = Figure(figsize=(5.2, 0.35 * len(names) + 1.6))
    axes = figure.add_subplot()
    image = axes.imshow(ranks, aspect="auto", cmap=COLOURS, vmin=0, vmax=1)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_xticks(thinned(blocks))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("block")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes)
    return figure


def _ranks(values: Sequence[float]) -> list[float]:
    """Each value's rank as a share of the largest rank; equal values have equal ranks."""
    ordered = sorted(set(values))
    return [ordered.index(value) / max(len(ordered) - 1, 1) for value in values]


def span_landscape(spans: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> Figure:
    """A picture of start × length of every span; the best start of each length is marked."""
    figure = Figure(figsize=(5.2 * len(spans), 4.4))
    for place, (name, lengths) in enumerate(spans.items(), 1):
        layers = len(lengths)
        values = np.full((layers, layers), np.nan)
        for length, starts in lengths.items():
            values[int(length) - 1, : len(starts)] = starts
        axes = figure.add_subplot(1, len(spans), place)
        image = axes.imshow(values, origin="lower", aspect="auto", cmap=COLOURS if name == "cosine" else f"{COLOURS}_r")
        best = [int(np.nanargmax(row) if name == "cosine" else np.nanargmin(row)) for row in values]
        axes.plot(best, range(layers), "o", markersize=3, color="red", label="most alike")
        axes.set_xlabel("first block of the span")
        axes.set_ylabel("blocks in the span")
        axes.set_xticks(thinned(layers))
        ticks = [length - 1 for length in thinned(layers + 1) if length]
        axes.set_yticks(ticks, [str(tick + 1) for tick in ticks])
        axes.set_title({"cosine": "mean cosine", "angular": "angle / π, last token"}.get(name, name), fontsize=10)
        axes.legend(fontsize=8)
        figure.colorbar(image, ax=axes)
    figure.suptitle(title, fontsize=10)
    return figure


def similarity(pairs: Sequence[Sequence[float]], title: str) -> Figure:
    """A picture of the CKA of every two blocks' outputs."""
    figure = Figure(figsize=(5.2, 4.4))
    axes = figure.add_subplot()
    image = axes.imshow(np.array(pairs), origin="lower", cmap=COLOURS, vmin=0, vmax=1)
    axes.set_xticks(thinned(len(pairs)))
    axes.set_yticks(thinned(len(pairs)))
    axes.set_xlabel("output of block")
    axes.set_ylabel("output of block")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes)
    return figure
