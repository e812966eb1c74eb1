"""The figures of the report, each with the numbers that it shows."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from llmprune.data.sources import clean_name
from llmprune.measurement.results import as_csv
from llmprune.plans.plan import Plan
from llmprune.pruning.scoring.pictures import heat_map, similarity, span_landscape
from llmprune.pruning.scoring.scores import Scores
from llmprune.reporting.collect import ReportedRun

LEGEND = 60  # largest number of lines in a legend

INK = "#010203"  # colour that is replaced by the page's text colour
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "llmprune",
    "font.size": 9,
    "font.family": "sans-serif",
    "text.parse_math": False,  # a $ in a name does not begin a formula
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "legend.frameon": False,
    "legend.labelcolor": INK,
}
SMOOTHING = 0.1  # weight of the newest loss in the running mean


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        name: name of the figure's files, before characters that file names can't have are replaced.
        title: description of the figure, as a sentence.
        figure: matplotlib figure.
        rows: numbers in the figure.
    """

    name: str
    title: str
    figure: Figure
    rows: Sequence[Mapping[str, Any]] = field(default=())

    @cached_property
    def svg(self) -> str:
        """The figure as an ``<svg>`` element in the page's text colour."""
        file = io.StringIO()
        with mpl.rc_context(STYLE):
            FigureCanvasSVG(self.figure)
            self.figure.savefig(file, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
        text = file.getvalue()
        return text[text.index("<svg") :].replace(INK, "currentColor")

    def save(self, folder: Path, name: str | None = None) -> None:
        """Write NAME.png, on white, and NAME.csv; the default of NAME is the figure's own name."""
        name = name or clean_name(self.name)
        with mpl.rc_context(STYLE):
            FigureCanvasAgg(self.figure)
            self.figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight", facecolor="white")
        (folder / f"{name}.csv").write_text(
            as_csv([dict(row) for row in self.rows]), encoding="utf-8", errors="replace"
        )


def pictures_of_run(run: ReportedRun) -> Iterator[Picture]:
    """Draw the losses of a run; of a pruning run, also its sparsity."""
    if any("loss/train/total" in line for line in run.metrics):
        yield training_curve(run)
    if run.prunes and any(_named(line, "l0/", "/expected_sparsity") for line in run.metrics):
        yield sparsity(run)
    if any(_named(line, "metrics/eval/loss/") for line in run.metrics):
        yield domain_losses(run)
    if any(_named(line, "mixing/weight/") for line in run.metrics):
        yield draw_domain_weights(run)


@mpl.rc_context(STYLE)
def training_curve(run: ReportedRun) -> Picture:
    """Draw the training loss, and the evaluation loss where it was measured."""
    trained = [(line["batch"], line["loss/train/total"]) for line in run.metrics if "loss/train/total" in line]
    evaluated = [(line["batch"], line["metrics/eval/loss"]) for line in run.metrics if "metrics/eval/loss" in line]
    figure, axes = _axes("batch", "nats per token")
    batches, losses = zip(*trained, strict=True)
    axes.plot(batches, losses, color="#8ab4d8", linewidth=0.6, alpha=0.7)
    axes.plot(batches, _smooth(losses), color="#2f7ed8", linewidth=1.6, label="training (running mean)")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", color="#e07b39", markersize=4, label="evaluation")
    _legend(axes)
    rows = [{"batch": b, "training_loss": value} for b, value in trained]
    return Picture(f"{run.name}-loss", f"Loss of {run.name}", figure, rows + [
        {"batch": b, "evaluation_loss": value} for b, value in evaluated
    ])  # fmt: skip


@mpl.rc_context(STYLE)
def sparsity(run: ReportedRun) -> Picture:
    """Draw the expected sparsity of every kind of gate, and its target."""
    figure, axes = _axes("batch", "sparsity")
    rows: list[dict[str, Any]] = []
    kinds = dict.fromkeys(kind for line in run.metrics for kind in _named(line, "l0/", "/expected_sparsity"))
    for number, kind in enumerate(kinds):
        lines = [line for line in run.metrics if f"l0/{kind}/expected_sparsity" in line]
        batches = [line["batch"] for line in lines]
        expected = [line[f"l0/{kind}/expected_sparsity"] for line in lines]
        target = [line.get(f"l0/{kind}/target_sparsity", np.nan) for line in lines]
        axes.plot(batches, expected, color=f"C{number}", label=kind.replace("_", " "))
        axes.plot(batches, target, color=f"C{number}", linestyle=":", linewidth=1)
        rows += [
            {"batch": b, "gates": kind, "expected": e, "target": t}
            for b, e, t in zip(batches, expected, target, strict=True)
        ]
    _legend(axes, "expected (dotted: target)")
    return Picture(f"{run.name}-sparsity", f"Sparsity of {run.name}", figure, rows)


@mpl.rc_context(STYLE)
def domain_losses(run: ReportedRun) -> Picture:
    """Draw the evaluation loss of every domain."""
    figure, axes = _axes("batch", "nats per token")
    rows: list[dict[str, Any]] = []
    domains = dict.fromkeys(name for line in run.metrics for name in _named(line, "metrics/eval/loss/"))
    for domain in domains:
        points = [
            (line["batch"], v) for line in run.metrics if (v := line.get(f"metrics/eval/loss/{domain}")) is not None
        ]
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=domain)
        rows += [{"batch": batch, "domain": domain, "loss": loss} for batch, loss in points]
    _legend(axes)
    return Picture(f"{run.name}-domains", f"Evaluation loss of {run.name} by domain", figure, rows)


@mpl.rc_context(STYLE)
def draw_domain_weights(run: ReportedRun) -> Picture:
    """Draw the weight of every domain in the training stream."""
    figure, axes = _axes("batch", "weight")
    delay = ((run.config.get("dynamic_loading") or {}).get("update_delay") or 0) if run.config else 0
    rows: list[dict[str, Any]] = []
    domains = dict.fromkeys(name for line in run.metrics for name in _named(line, "mixing/weight/"))
    for domain in domains:
        points = [(line["batch"], v) for line in run.metrics if (v := line.get(f"mixing/weight/{domain}")) is not None]
        later = [(batch + delay, weight) for batch, weight in points[1:]]  # the batch at which a weight takes effect
        points = [points[0], *(point for point in later if point[0] < run.batches)]
        ended = [*points, (run.batches, points[-1][1])]
        axes.plot(*zip(*ended, strict=True), drawstyle="steps-post", label=domain)
        rows += [{"batch": batch, "domain": domain, "weight": weight} for batch, weight in points]
    axes.set_ylim(bottom=0)
    _legend(axes)
    return Picture(f"{run.name}-weights", f"Weights of domains in {run.name}", figure, rows)


def pictures_of_scores(name: str, scores: Scores) -> Iterator[Picture]:
    """Draw the heat maps of a scores.json."""
    blocks = {**scores.blocks, **{f"{sub} alone": values for sub, values in scores.subblocks.items()}}
    if blocks:
        yield importance(blocks, name)
    for criterion, lengths in scores.spans.items():
        yield spans(criterion, lengths, name)
    if "cka" in scores.pairs:
        yield likeness(scores.pairs["cka"], name)


@mpl.rc_context(STYLE)
def importance(blocks: Mapping[str, Sequence[float]], name: str) -> Picture:
    """Draw the scores of blocks × criteria."""
    rows = [{"criterion": c, **{f"block {i}": v for i, v in enumerate(values)}} for c, values in blocks.items()]
    return Picture(f"{name}-scores", f"{name}: importance by rank (0 goes first)", heat_map(blocks, ""), rows)


@mpl.rc_context(STYLE)
def spans(criterion: str, lengths: Mapping[str, Sequence[float]], name: str) -> Picture:
    """Draw the score of every span by its start and its length."""
    rows = [
        {"blocks": int(length), "first": first, "score": value}
        for length, starts in lengths.items()
        for first, value in enumerate(starts)
    ]
    figure = span_landscape({criterion: lengths}, "")
    return Picture(f"{name}-spans-{criterion}", f"{name}: how alike the ends of every span are", figure, rows)


@mpl.rc_context(STYLE)
def likeness(pairs: Sequence[Sequence[float]], name: str) -> Picture:
    """Draw the CKA of all pairs of block outputs."""
    rows = [{"block": i, **{str(j): v for j, v in enumerate(values)}} for i, values in enumerate(pairs)]
    return Picture(f"{name}-cka", f"{name}: CKA of block outputs", similarity(pairs, ""), rows)


def pictures_of_quality(place: str, results: Mapping[str, Any], speeds: Mapping[str, float]) -> Iterator[Picture]:
    """Draw perplexity against size, and against speed where it was measured.

    Args:
        place: name of the results.
        results: contents of a results.json.
        speeds: tokens per second, by model.
    """
    quality = {model: value for model, entry in results["models"].items() if (value := _perplexity(entry))}
    for name, label, values in (
        ("size", "million parameters", {m: results["models"][m].get("parameters", 0) / 1e6 for m in quality}),
        ("speed", "tokens per second", {m: speeds[m] for m in quality if m in speeds}),
    ):
        if values:
            yield trade_off(f"{place}-quality-{name}", f"Perplexity against {label} ({place})", label, values, quality)


@mpl.rc_context(STYLE)
def trade_off(name: str, title: str, label: str, values: Mapping[str, float], quality: Mapping[str, float]) -> Picture:
    """Draw the perplexity of models against another quantity, such as size or speed."""
    figure, axes = _axes(label, "perplexity (mean over texts)")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    if max(quality.values()) < 3 * min(quality.values()):  # in a larger range, labels between decades would overlap
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    else:
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.25)
    for model, value in values.items():
        axes.plot(value, quality[model], "o", markersize=7)
        axes.annotate(Path(model).name, (value, quality[model]), xytext=(6, 4), textcoords="offset points")
    rows = [{"model": m, label: v, "perplexity": quality[m]} for m, v in values.items()]
    return Picture(name, title, figure, rows)


def _perplexity(entry: Mapping[str, Any]) -> float | None:
    """The geometric mean over texts of the first BOS mode's perplexity."""
    found = [
        next((value for mode, value in text.items() if mode.startswith("bos_")), None)
        for text in entry.get("perplexity", {}).values()
    ]
    numbers = [value for value in found if value is not None and value > 0]
    if not found or len(numbers) < len(found):  # a perplexity is missing: the model is broken
        return None
    return float(np.exp(np.mean(np.log(numbers))))


def fastest(entry: Mapping[str, Any]) -> float | None:
    """Tokens per second of generation at the smallest batch, for a model in a speed.json."""
    measured = [e for e in entry["generation"] if "tokens_per_s" in e]
    return float(min(measured, key=lambda e: e["batch"])["tokens_per_s"]) if measured else None


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.0, 3.2))
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _legend(axes: Axes, title: str | None = None) -> None:
    """Add a legend below the axes, where it hides nothing; no legend if there are too many lines."""
    if len(axes.get_lines()) > LEGEND:
        return
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.17), ncol=4, title=title, handlelength=1.2, columnspacing=1.2
    )


def _named(line: Mapping[str, Any], prefix: str, suffix: str = "") -> list[str]:
    """The parts between ``prefix`` and ``suffix`` in the names of a line's metrics."""
    return [
        name.removeprefix(prefix).removesuffix(suffix)
        for name in line
        if name.startswith(prefix) and name.endswith(suffix)
    ]


def _smooth(values: Sequence[float]) -> list[float]:
    smoothed, mean = [], values[0]
    for value in values:
        mean += SMOOTHING * (value - mean)
        smoothed.append(mean)
    return smoothed


CELLS = 64  # largest number of cells for heads, channels or hidden dimensions
KEPT = LinearSegmentedColormap.from_list("kept", [(0.5, 0.5, 0.5, 0.18), (0.18, 0.49, 0.85, 1.0)])


def picture_of_plan(plan: Plan, name: str) -> Picture:
    """Draw blocks × heads, blocks × channels, and hidden dimensions; a darker cell has more kept parts."""
    source = plan.source
    heads, channels = (np.zeros((source.layers, size)) for size in (source.heads, source.intermediate))
    for block in plan.blocks:
        for number, weight in block.merge or ((None, 0.0),):
            if number is not None and weight:
                heads[number], channels[number] = 0.5, 0.5  # the block is merged into a sum
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
    """Combine columns to at most ``CELLS``, each the mean of the columns that it represents."""
    parts = np.array_split(values, min(CELLS, values.shape[1]), axis=1)
    return np.stack([part.mean(1) for part in parts], axis=1)
