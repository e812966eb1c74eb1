"""The figures of the report, each with the numbers that it shows."""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from llmprune.data.sources import clean_name
from llmprune.measurement.results import as_csv
from llmprune.plans.plan import Plan
from llmprune.pruning.scoring.pictures import heat_map, similarity, span_landscape, thinned
from llmprune.pruning.scoring.scores import Scores
from llmprune.reporting.collect import ReportedRun, source_of

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
WIDEST = 40  # largest number of characters of a model's label in a legend
MARKERS = "osv^Pp*X"
UNITS = ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"), (1, "tokens"))


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


class TrainingAxis:
    """The horizontal axis of a run's figures: tokens if the run counted them, otherwise batches.

    Attributes:
        label: label of the axis.
    """

    def __init__(self, run: ReportedRun) -> None:
        """Read how many tokens came before each batch."""
        counted = sorted((line["batch"], line["time/token"]) for line in run.metrics if "time/token" in line)
        self._batches, self._tokens = [batch for batch, _ in counted], [tokens for _, tokens in counted]
        self._counted = bool(counted) and self._batches[-1] > 0 and self._tokens[-1] > 0
        most = self._tokens_before(run.batches + 1) if self._counted else 0
        self._unit: float
        self._unit, words = next((unit for unit in UNITS if most >= unit[0]), UNITS[-1])
        self.label = words if self._counted else "batch"

    def _tokens_before(self, batch: float) -> float:
        last, tokens = self._batches[-1], self._tokens[-1]
        if batch > last:  # the end of the run has no line of training
            return float(tokens * batch / last)
        return float(np.interp(batch, self._batches, self._tokens))

    def at(self, batch: float) -> float:
        """The position of a batch on the axis."""
        return self._tokens_before(batch) / self._unit if self._counted else batch

    def numbers(self, batch: float) -> dict[str, float]:
        """A batch as columns of a CSV file."""
        return {"batch": batch, **({"tokens": round(self._tokens_before(batch))} if self._counted else {})}


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
    along = TrainingAxis(run)
    figure, axes = _axes(along.label, "nats per token")
    places, losses = [along.at(batch) for batch, _ in trained], [loss for _, loss in trained]
    axes.plot(places, losses, color="#8ab4d8", linewidth=0.6, alpha=0.7)
    parts = dict.fromkeys(name for line in run.metrics for name in line if re.fullmatch("distillation/[a-z]+", name))
    words = " + ".join(part.partition("/")[2] for part in parts)  # a weighted sum, not the loss that is evaluated
    label = f"training: {words} (running mean)" if words else "training (running mean)"
    axes.plot(places, _smooth(losses), color="#2f7ed8", linewidth=1.6, label=label)
    if evaluated:
        places = [along.at(batch) for batch, _ in evaluated]
        axes.plot(places, [loss for _, loss in evaluated], "o-", color="#e07b39", markersize=4, label="evaluation")
    _legend(axes)
    rows = [{**along.numbers(b), "training_loss": value} for b, value in trained]
    return Picture(f"{run.name}-loss", f"Loss of {run.name}", figure, rows + [
        {**along.numbers(b), "evaluation_loss": value} for b, value in evaluated
    ])  # fmt: skip


@mpl.rc_context(STYLE)
def sparsity(run: ReportedRun) -> Picture:
    """Draw the expected sparsity of every kind of gate, and its target."""
    along = TrainingAxis(run)
    figure, axes = _axes(along.label, "sparsity")
    rows: list[dict[str, Any]] = []
    kinds = dict.fromkeys(kind for line in run.metrics for kind in _named(line, "l0/", "/expected_sparsity"))
    for number, kind in enumerate(kinds):
        lines = [line for line in run.metrics if f"l0/{kind}/expected_sparsity" in line]
        batches = [line["batch"] for line in lines]
        expected = [line[f"l0/{kind}/expected_sparsity"] for line in lines]
        target = [line.get(f"l0/{kind}/target_sparsity", np.nan) for line in lines]
        places = [along.at(batch) for batch in batches]
        axes.plot(places, expected, color=f"C{number}", label=kind.replace("_", " "))
        axes.plot(places, target, color=f"C{number}", linestyle=":", linewidth=1)
        rows += [
            {**along.numbers(b), "gates": kind, "expected": e, "target": t}
            for b, e, t in zip(batches, expected, target, strict=True)
        ]
    _legend(axes, "expected (dotted: target)")
    return Picture(f"{run.name}-sparsity", f"Sparsity of {run.name}", figure, rows)


@mpl.rc_context(STYLE)
def domain_losses(run: ReportedRun) -> Picture:
    """Draw the evaluation loss of every domain."""
    along = TrainingAxis(run)
    figure, axes = _axes(along.label, "nats per token")
    rows: list[dict[str, Any]] = []
    domains = dict.fromkeys(name for line in run.metrics for name in _named(line, "metrics/eval/loss/"))
    for domain in domains:
        points = [
            (line["batch"], v) for line in run.metrics if (v := line.get(f"metrics/eval/loss/{domain}")) is not None
        ]
        axes.plot([along.at(batch) for batch, _ in points], [v for _, v in points], "o-", markersize=4, label=domain)
        rows += [{**along.numbers(batch), "domain": domain, "loss": loss} for batch, loss in points]
    _legend(axes)
    return Picture(f"{run.name}-domains", f"Evaluation loss of {run.name} by domain", figure, rows)


@mpl.rc_context(STYLE)
def draw_domain_weights(run: ReportedRun) -> Picture:
    """Draw the weight of every domain in the training stream."""
    along = TrainingAxis(run)
    figure, axes = _axes(along.label, "weight")
    delay = ((run.config.get("dynamic_loading") or {}).get("update_delay") or 0) if run.config else 0
    rows: list[dict[str, Any]] = []
    domains = dict.fromkeys(name for line in run.metrics for name in _named(line, "mixing/weight/"))
    for domain in domains:
        points = [(line["batch"], v) for line in run.metrics if (v := line.get(f"mixing/weight/{domain}")) is not None]
        later = [(batch + delay, weight) for batch, weight in points[1:]]  # the batch at which a weight takes effect
        points = [points[0], *(point for point in later if point[0] < run.batches)]
        ended = [*points, (run.batches, points[-1][1])]
        places = [along.at(batch) for batch, _ in ended]
        axes.plot(places, [weight for _, weight in ended], drawstyle="steps-post", label=domain)
        rows += [{**along.numbers(batch), "domain": domain, "weight": weight} for batch, weight in points]
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


def pictures_of_quality(
    place: str, results: Mapping[str, Any], speeds: Mapping[str, float], label: Callable[[str], str]
) -> Iterator[Picture]:
    """Draw perplexity against size, and against speed where it was measured.

    Args:
        place: name of the results.
        results: contents of a results.json.
        speeds: tokens per second, by model.
        label: function that returns a model's label.
    """
    models = results["models"]
    quality = {model: value for model, entry in models.items() if (value := _perplexity(entry))}
    texts = dict.fromkeys(text for model in quality for text in models[model]["perplexity"])
    words = f"perplexity of {next(iter(texts))}" if len(texts) == 1 else "perplexity (mean over texts)"
    sizes = {model: size for model in quality if (size := models[model].get("parameters"))}
    scale, size_unit = (
        (1e9, "billion parameters") if max(sizes.values(), default=0) >= 1e9 else (1e6, "million parameters")
    )
    for name, unit, values in (
        ("size", size_unit, {model: size / scale for model, size in sizes.items()}),
        ("speed", "tokens per second", {m: speeds[m] for m in quality if m in speeds}),
    ):
        if values:
            figure = trade_off(unit, words, values, quality, source_of(models), label)
            rows = [{"model": m, unit: v, "perplexity": quality[m]} for m, v in values.items()]
            title = f"Perplexity against {unit} ({place})"
            yield Picture(f"{place}-quality-{name}", title, figure, rows)


@mpl.rc_context(STYLE)
def trade_off(
    unit: str,
    words: str,
    values: Mapping[str, float],
    quality: Mapping[str, float],
    source: str | None,
    label: Callable[[str], str],
) -> Figure:
    """Draw the perplexity of models against another quantity, such as size or speed; the source is a diamond."""
    figure, axes = _axes(unit, _clipped(words))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    drawn = [quality[model] for model in values]
    if max(drawn) < 3 * min(drawn):  # in a larger range, labels between decades would overlap
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.15)
    for number, (model, value) in enumerate(values.items()):
        if model == source:
            axes.axhline(quality[model], color=INK, linewidth=0.6, linestyle=":")
        marker = "D" if model == source else MARKERS[number % len(MARKERS)]
        axes.plot(value, quality[model], marker, markersize=8, color=f"C{number}", label=_clipped(label(model)))
    _legend(axes, columns=2 if max(map(len, map(label, values))) > 12 else 4)
    return figure


def _clipped(words: str) -> str:
    return words if len(words) <= WIDEST else f"{words[: WIDEST - 1]}…"


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


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.0, 3.2))
    axes = figure.add_subplot()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _legend(axes: Axes, title: str | None = None, columns: int = 4) -> None:
    """Add a legend below the axes, where it hides nothing; no legend if there are too many lines."""
    if len(axes.get_lines()) > LEGEND:
        return
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.17), ncol=columns, title=title, handlelength=1.2, columnspacing=1.2
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
STAYS, GOES, MERGED = (0.18, 0.49, 0.85, 1.0), (0.5, 0.5, 0.5, 0.18), (0.88, 0.48, 0.22, 1.0)
KEPT = LinearSegmentedColormap.from_list("kept", [GOES, STAYS])


def picture_of_plan(plan: Plan, name: str) -> Picture:
    """Draw hidden dimensions, blocks × heads and blocks × channels: what stays, goes, or is merged into another block.

    Args:
        plan: plan to draw.
        name: label of the plan, or of the models that were cut by it.
    """
    source, shape = plan.source, plan.shape
    heads, channels = (np.zeros((source.layers, size)) for size in (source.heads, source.intermediate))
    merged = np.zeros(source.layers, dtype=bool)
    for block in plan.blocks:
        for number, weight in block.merge or ():
            merged[number] |= weight != 0 and number != block.attention
        heads[block.attention, list(plan.heads(block))] = 1
        channels[block.mlp, list(plan.channels(block))] = 1
    for sublayer, number in plan.skipped:
        (heads if sublayer == "attention" else channels)[number] = 0
    hidden = np.zeros((1, source.hidden))
    hidden[0, list(range(source.hidden)) if plan.hidden is None else list(plan.hidden)] = 1

    drawn = (
        ("hidden", hidden, np.zeros(1, dtype=bool), f"hidden dimensions: {shape.hidden:,} of {source.hidden:,}"),
        ("heads", heads, merged, f"heads: {shape.heads} of {source.heads}"),
        ("channels", channels, merged, f"channels: {shape.intermediate:,} of {source.intermediate:,}"),
    )
    with mpl.rc_context(STYLE):
        height = max(min(0.16 * source.layers, 6.4), 1.2)
        figure = Figure(figsize=(5.0, height + 1.6), layout="constrained")
        panels = figure.subplot_mosaic([["hidden", "hidden"], ["heads", "channels"]], height_ratios=[0.2, height])
        partly = False
        for key, values, others, title in drawn:
            cells = _cells(values)
            partly |= bool(((cells > 0) & (cells < 1)).any())
            colours = KEPT(cells)
            colours[others & (cells.max(1) == 0)] = MERGED
            panels[key].imshow(colours, aspect="auto", interpolation="nearest")
            panels[key].set_title(title, fontsize=9)
            panels[key].set_xticks([])
            panels[key].set_yticks([] if key == "hidden" else thinned(source.layers))
        panels["heads"].set_ylabel("block of the source")
        entries = [
            ("stays", STAYS, True), ("a part stays", KEPT(0.5), partly),
            ("is merged into another block", MERGED, merged.any()), ("goes", GOES, True),
        ]  # fmt: skip
        handles = [
            Patch(facecolor=colour, edgecolor=INK, linewidth=0.4, label=t) for t, colour, shown in entries if shown
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    rows = [
        {"block": number, "heads": int((heads[number] == 1).sum()), "channels": int((channels[number] == 1).sum())}
        for number in range(source.layers)
    ]
    words = [f"{name}: {len(plan.blocks)} of {source.layers} blocks", *_gone(heads.max(1) == 0, channels.max(1) == 0)]
    return Picture(f"{name}-plan", "; ".join(words), figure, rows)


def _cells(values: np.ndarray) -> np.ndarray:
    """Combine columns to at most ``CELLS``, each the mean of the columns that it represents."""
    parts = np.array_split(values, min(CELLS, values.shape[1]), axis=1)
    return np.stack([part.mean(1) for part in parts], axis=1)


def _gone(attention: np.ndarray, mlp: np.ndarray) -> list[str]:
    """The numbers of the blocks, attentions and MLPs that do not stay, as text."""
    kinds = (("blocks", attention & mlp), ("attentions", attention & ~mlp), ("MLPs", mlp & ~attention))
    return [f"{kind} that go: {_ranges(np.flatnonzero(gone).tolist())}" for kind, gone in kinds if gone.any()]


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, such as ``2, 4–6``."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True))
