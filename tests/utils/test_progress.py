"""How far long work is: lines in a file, a bar on a terminal."""

import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from data_prep.pack import prepare
from data_prep.recipe import PackSettings
from data_prep.teach import TeachConfig, teach
from llmprune.conversion.quantize import QuantizeConfig, quantize
from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.evaluation.continuations import GenerationConfig, Prompt, write_continuations
from llmprune.jobs.score import score
from llmprune.measurement.measure import MeasureConfig, measure
from llmprune.models.loaded import open_model
from llmprune.models.placement import Placement
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.utils.files import write_text
from llmprune.utils.logs import logs_shown
from llmprune.utils.progress import Progress, duration

CPU = Placement("float32", "cpu")


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_lines_in_a_file(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(desc="scoring", total=4000, unit="block passes") as progress:
        for _ in range(80):  # a second each
            clock.now += 1
            progress.update(50)
    assert capsys.readouterr().err.splitlines() == [
        "scoring: 1,500 of 4,000 (38 %) block passes, 50 per second, 50 s left",
        "scoring: 3,000 of 4,000 (75 %) block passes, 50 per second, 20 s left",
        "scoring: 4,000 of 4,000 (100 %) block passes, 50 per second, after 80 s",
    ]


def test_steps_of_an_iterable_that_grow_slower(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for n in Progress(range(14), desc="slower"):
        clock.now += 10 if n < 7 else 40
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split()[1]) for line in lines] == [3, 6, 8, 9, 10, 11, 12, 13, 14]


def test_short_work_has_no_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in Progress(range(29), desc="short"):
        clock.now += 1
    assert capsys.readouterr().err == ""


def test_steps_that_are_long(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of an iterable, from a step on that was done before, and without a total."""
    with Progress(desc="comparing", total=4, unit="candidates", initial=1) as progress:
        for _ in range(3):
            clock.now += 2000
            progress.update()
    for _ in Progress((n for n in range(2)), desc="merging", unit="merges tried"):
        clock.now += 40
    assert capsys.readouterr().err.splitlines() == [
        "comparing: 2 of 4 (50 %) candidates, 33 min each, 1 h 6 min left",
        "comparing: 3 of 4 (75 %) candidates, 33 min each, 33 min left",
        "comparing: 4 of 4 (100 %) candidates, 33 min each, after 1 h 40 min",
        "merging: 1 merges tried, 40 s each",
        "merging: 2 merges tried, 40 s each",
        "merging: 2 merges tried, 40 s each, after 80 s",
    ]


def test_bytes(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(desc="packing", total=8_000_000, unit="B", initial=1_000_000) as progress:
        clock.now += 40
        progress.update(3_000_000)
    assert capsys.readouterr().err.splitlines()[0] == "packing: 4.0 MB of 8.0 MB (50 %), 0.1 MB per second, 53 s left"


def test_one_rank_shows_it(clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with Progress(desc=f"rank {rank}", total=2) as progress:
            clock.now += 60
            progress.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("rank 0: ") for line in lines)


def test_the_log_has_the_lines_and_standard_error_has_each_once(
    clock: Clock, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "llmprune")
    for level in ("WARNING", "INFO"):
        monkeypatch.setenv("LLMPRUNE_LOG", level)
        with logs_shown():
            logging.getLogger("llmprune").setLevel(logging.INFO)  # as a job with a log.txt does
            for _ in Progress(range(2), desc=level):
                clock.now += 40
        assert capsys.readouterr().err.count(f"{level}: 1 of 2 (50 %) steps") == 1
    assert len(caplog.messages) == 4


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for _ in Progress(range(7), desc="scoring", unit="samples"):
        pass
    assert (
        "scoring: 100%|" in terminal.getvalue() and "7/7" in terminal.getvalue() and " samples/s" in terminal.getvalue()
    )


JOBS: dict[str, Any] = {
    # 6 blocks: 6 passes of a sample, 15 of the variants without a block, 18 of the gradients
    "scoring: 273 of 273 (100 %) block passes": lambda model, data, out: score(
        model, LayerScoringConfig(CalibrationConfig(data, 7, 24), ["taylor", "perplexity"]), CPU
    ),
    "scoring: 147 of 147 (100 %) block passes": lambda model, data, out: score(
        model, LayerScoringConfig(CalibrationConfig(data, 7, 24), ["perplexity"]), CPU, offload=True
    ),
    "teaching: 164 of 164 (100 %) samples": lambda model, data, out: teach(
        data, model, out, TeachConfig(top_k=2, dtype="float32")
    ),
    "packing: 0.0 MB of 0.0 MB (100 %)": lambda model, data, out: prepare(
        [write_text(out.with_suffix(".txt"), "one two three " * 60) or out.with_suffix(".txt")],
        Path(model),
        out,
        PackSettings(sequence_length=16, eval_fraction=0.0),
        processes=1,
        progress=True,
    ),
    "generating: 6 of 6 (100 %) continuations": lambda model, data, out: write_continuations(
        open_model(model, CPU), [Prompt("3: one")] * 3, GenerationConfig(4, 1.0, per_prompt=2, batch_size=2)
    ),
    "measuring: 8 of 8 (100 %) runs": lambda model, data, out: measure(
        [model], MeasureConfig([1], [4], [3], warmups=1, repeats=2), CPU
    ),
    "quantising: 56 of 56 (100 %) samples in blocks": lambda model, data, out: quantize(
        model, out, QuantizeConfig(CalibrationConfig(data, 4, 32), group_size=16)
    ),
}


@pytest.mark.parametrize("end", JOBS)
def test_what_long_jobs_show(
    end: str,
    trained_folder: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmprune.utils.progress.SECONDS", 1e-9)
    JOBS[end](str(trained_folder), str(data), tmp_path / "out")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(end.partition(":")[0])]
    assert lines[-1].startswith(f"{end}, ") and " after " in lines[-1]


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.0, 0.41, 99.4, 100, 3599, 3600, 9000)] == [
        "0 s", "0.41 s", "99 s", "2 min", "60 min", "1 h 0 min", "2 h 30 min",
    ]  # fmt: skip
