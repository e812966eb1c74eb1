"""The figures: labels that do not overlap, axes by tokens, what a plan's picture says."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from llmprune.models.families import Shape
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.pruning.scoring.scores import Scores
from llmprune.reporting.collect import collect
from llmprune.reporting.figures import Picture, picture_of_plan, pictures_of_run, pictures_of_scores, trade_off
from tests.reporting import job_folder


def labels_along(axes: Axes, figure: Figure) -> list[list[Any]]:
    """The boxes of the labels of both axes, in the order of their places."""
    FigureCanvasAgg(figure).draw()
    boxes = []
    for axis, low in ((axes.xaxis, "x0"), (axes.yaxis, "y0")):
        drawn = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
        boxes.append(sorted(drawn, key=lambda box, low=low: getattr(box, low)))  # type: ignore[misc]
    return boxes


def check_readable(picture: Picture) -> None:
    assert picture.figure.get_figwidth() <= 5.5  # wider ones would be shrunk to the width of a phone
    for axes in picture.figure.axes:
        across, up = labels_along(axes, picture.figure)
        assert all(right.x0 > left.x1 for left, right in pairwise(across))
        assert all(upper.y0 > lower.y1 for lower, upper in pairwise(up))
        assert all(label.get_fontsize() >= 7 for label in (*axes.get_xticklabels(), *axes.get_yticklabels()))


def shape_of(layers: int) -> Shape:
    return Shape(layers, hidden=64, heads=8, kv_heads=4, head_dim=8, intermediate=96)


@pytest.mark.parametrize("layers", [4, 30, 80, 128])
def test_labels_can_be_read(layers: int) -> None:
    values = [math.sin(block) for block in range(layers)]
    scores = Scores(
        "m", "llama", "abc", shape_of(layers), {}, {}, None, {"block_influence": values, "magnitude_l2": values},
        spans={"cosine": {str(length): values[: layers - length + 1] for length in range(1, layers + 1)}},
        pairs={"cka": [values] * layers},
    )  # fmt: skip
    plan = Plan("llama", "abc", shape_of(layers), tuple(KeptBlock.whole(i) for i in range(0, layers, 2)))
    drawn = [*pictures_of_scores("m", scores), picture_of_plan(plan, "cut")]
    assert len(drawn) == 4
    for picture in drawn:
        check_readable(picture)


def test_what_the_picture_of_a_plan_says() -> None:
    whole = [KeptBlock(i, i, heads=(0, 1), channels=tuple(range(0, 96, 2))) for i in (0, 1, 5, 9)]
    merging = KeptBlock(3, 3, heads=(0, 1), channels=tuple(range(0, 96, 2)), merge=((3, 0.5), (4, 0.5)))
    plan = Plan("llama", "abc", shape_of(10), (*whole[:2], merging, *whole[2:]))
    picture = picture_of_plan(plan, "cut")
    assert picture.title == "cut: 5 of 10 blocks; blocks that go: 2, 4, 6–8"
    legend = [text.get_text() for text in picture.figure.legends[0].get_texts()]
    assert legend == ["stays", "a part stays", "is merged into another block", "goes"]
    plan = Plan("llama", "abc", shape_of(4), (KeptBlock.whole(0), KeptBlock(1, 2), KeptBlock.whole(3)))
    picture = picture_of_plan(plan, "cut")
    assert picture.title == "cut: 3 of 4 blocks; attentions that go: 2; MLPs that go: 1"
    assert [text.get_text() for text in picture.figure.legends[0].get_texts()] == ["stays", "goes"]


@pytest.mark.parametrize("counted", [True, False])
def test_curves_are_drawn_by_tokens_where_they_were_counted(counted: bool, tmp_path: Path) -> None:
    job_folder.run(tmp_path / "run", "2031-05-06 07:08:09", batches=5)
    if not counted:
        metrics = tmp_path / "run/metrics.jsonl"
        metrics.write_text(metrics.read_text().replace("time/token", "time/other"))
    (picture,) = pictures_of_run(collect([tmp_path / "run"]).runs[0])
    axes = picture.figure.axes[0]
    training, evaluation = axes.lines[0].get_xdata(), axes.lines[2].get_xdata()
    per_batch = job_folder.TOKENS_PER_BATCH / 1000 if counted else 1
    assert axes.get_xlabel() == ("thousand tokens" if counted else "batch")
    assert [*training] == pytest.approx([batch * per_batch for batch in range(5)])
    assert [*evaluation] == pytest.approx([5 * per_batch])  # after the last batch
    wanted = {"batch": 5, "tokens": 5 * job_folder.TOKENS_PER_BATCH} if counted else {"batch": 5}
    assert picture.rows[-1] == {**wanted, "evaluation_loss": 2.5}


def test_a_weighted_sum_of_objectives_is_not_called_the_loss(tmp_path: Path) -> None:
    job_folder.run(tmp_path / "run", "2031-05-06 07:08:09", batches=3)
    metrics = tmp_path / "run/metrics.jsonl"
    before = '"loss/train/total"'
    metrics.write_text(
        metrics.read_text().replace(before, f'"distillation/kl": 1, "distillation/weight/kl": 1, {before}')
    )
    (picture,) = pictures_of_run(collect([tmp_path / "run"]).runs[0])
    words = [text.get_text() for text in picture.figure.axes[0].get_legend().get_texts()]
    assert words == ["training: kl (running mean)", "evaluation"]


def test_the_source_is_marked() -> None:
    sizes, quality = {"b": 70.0, "a": 50.0}, {"b": 3.3, "a": 4.0}
    axes = trade_off("billion parameters", "perplexity of x", sizes, quality, "b", {"b": "big (source)", "a": "a"}.get)  # type: ignore[arg-type]
    markers = {str(line.get_label()): line.get_marker() for line in axes.axes[0].lines}
    assert markers["big (source)"] == "D" and markers["a"] != "D"
