"""The report on the folder of a whole job: what it finds there, in which order, and the line that it begins with."""

import html
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmprune.reporting.collect import collect
from llmprune.reporting.page import write_report
from tests.harness.browser import chromium
from tests.reporting import job_folder

SECTIONS = ["Text samples", "Quality against size and speed", "Models and plans", "Training", "Scores", "Commands"]


@pytest.fixture(scope="module")
def job(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return job_folder.make(tmp_path_factory.mktemp("made") / "job", model_folder)


def written(place: Path, out: Path) -> str:
    return html.unescape(write_report([place], out / "report.html").read_text()).replace("\N{NO-BREAK SPACE}", " ")


def changed(job: Path, folder: Path, name: str, change: Any) -> Path:
    """A copy of the job's JSON files, of which ``change`` has changed one."""
    folder.mkdir()
    for file in ("results.json", "speed.json"):
        shutil.copy(job / file, folder)
    content = json.loads((folder / name).read_text())
    change(content["models"])
    job_folder.write(folder / name, content)
    return folder


def test_everything_is_found_in_the_order_of_the_work(job: Path) -> None:
    found = collect([job])
    assert [*found.labels.values()] == ["source", "pruned", "model"] == [model.name for model in found.models]
    assert [found.label(model) for model in found.continuations] == ["source", "pruned", "model"]
    assert len(found.scores) == len(found.plans) == len(found.results) == len(found.speeds) == 1 and not found.left_out


def test_a_folder_that_was_moved(model_folder: Path, tmp_path: Path) -> None:
    job_folder.make(tmp_path / "before", model_folder).rename(tmp_path / "after")
    job_folder.run(tmp_path / "after/again", "2031-05-06 07:08:10")
    found = collect([tmp_path / "after"])
    assert [*found.labels.values()] == ["source", "pruned", "model"]
    assert [run.name for run in found.runs] == ["recover", "again"]  # by the time at which they were started


def test_a_run_without_a_log_began_when_its_config_was_written(tmp_path: Path) -> None:
    for name, begun in (("b", 1_000_000_000), ("a", 2_000_000_000)):
        job_folder.run(tmp_path / name, "no date")
        os.utime(tmp_path / name / "config.yaml", (begun, begun))
    assert [run.name for run in collect([tmp_path]).runs] == ["b", "a"]


def test_the_page_begins_with_the_answer(job: Path, tmp_path: Path) -> None:
    page = written(job, tmp_path)
    answer = "Parameters −25 %, 1.3× as fast, perplexity 12.1 → 13.0, 118 MB less memory"
    aloud = "25 percent fewer parameters, 1.3 times as fast, perplexity from 12.1 to 13.0, 118 megabytes less memory"
    assert f'<h1><span aria-hidden="true">{answer}</span><span class="spoken">{aloud}</span></h1>' in page
    basis = "model compared with source; perplexity of wiki; generation of 64 tokens after 16, batch 1 (gpu, bfloat16)."
    assert basis in page
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", page) == SECTIONS
    assert not re.search(r"\b(None|nan|NaN|null)\b", re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL))
    assert page.count("<svg") == 5  # size, speed, one plan although three files have it, loss, scores
    assert "pruned, model: 3 of 4 blocks; blocks that go: 1" in page
    row = page[page.index("perplexity of other, BOS once") :]
    assert re.findall(r"<td[^>]*>(.*?)</td>", row)[:3] == ["20.00", "no number", "20.00"]


def test_texts_are_paired_by_prompt(job: Path, tmp_path: Path) -> None:
    page = written(job, tmp_path)
    prompts = re.findall(r"<b>prompt</b>(.*?)</p>", page)
    assert prompts == ["first", "second", "alone"]  # what all models continued comes first
    first = page[page.index("</b>first</p>") : page.index("</b>second</p>")]
    answers = re.findall(r"<b>(.*?)</b><p>(.*?)</p>", first)
    assert answers == [(name, f"{name} on first") for name in ("source", "pruned", "model")]


def test_the_original_text_is_shown_and_of_several_continuations_the_first(tmp_path: Path) -> None:
    records = [{"prompt": "p", "output": text, "reference": "how it went on"} for text in ("one", "two")]
    job_folder.write(tmp_path / "base.jsonl", *records)
    job_folder.write(tmp_path / "prompts.jsonl", {"prompt": "p", "reference": None})
    answers = re.findall(r"<b>(.*?)</b><p>(.*?)</p>", written(tmp_path, tmp_path))
    assert answers == [("the original", "how it went on"), ("base", "one")]


def test_a_source_from_the_hub(model_folder: Path, tmp_path: Path) -> None:
    job = job_folder.make(tmp_path / "job", model_folder, hub="org/big-base")
    found = collect([job])
    assert [*found.labels.values()] == ["big-base (source)", "pruned", "model"]
    assert [found.label(model) for model in found.continuations] == ["big-base (source)", "pruned", "model"]
    assert "model compared with big-base (source); " in written(job, tmp_path)


@pytest.mark.parametrize(
    "name, change, answer",
    [
        ("results.json", lambda models: [entry.pop("perplexity") for entry in models.values()],
         "Parameters −25 %, 1.3× as fast, 118 MB less memory"),
        ("speed.json", lambda models: [entry["generation"].clear() for entry in models.values()],
         "Parameters −25 %, perplexity 12.1 → 13.0"),
        ("results.json", lambda models: [*models.values()][2]["perplexity"]["wiki"].update(bos_once=None),
         "Parameters −25 %, 1.3× as fast, perplexity 12.1 → no number, 118 MB less memory"),
        ("results.json", lambda models: [*models.values()][2].update(parameters=1_990_000),
         "Parameters −0.5 %, 1.3× as fast, perplexity 12.1 → 13.0, 118 MB less memory"),
        ("speed.json", lambda models: [*models.values()][2]["generation"][1].update(
            speedup={"p50": 0.954, "p10": 0.9, "p90": 1.0}, peak_memory_bytes=2_100_000_000),
         "Parameters −25 %, 0.95× as fast, perplexity 12.1 → 13.0, 1.60 GB more memory"),
    ],
)  # fmt: skip
def test_only_what_was_measured_is_in_the_headline(
    job: Path, name: str, change: Any, answer: str, tmp_path: Path
) -> None:
    assert f'<span aria-hidden="true">{answer}</span>' in written(changed(job, tmp_path / "x", name, change), tmp_path)


def test_without_a_source_there_is_no_headline(job: Path, tmp_path: Path) -> None:
    def same_size(models: dict[str, Any]) -> None:
        for entry in models.values():
            entry["parameters"] = 5

    (tmp_path / "a").mkdir()
    folder = changed(job, tmp_path / "a/b", "results.json", same_size)
    (folder / "speed.json").unlink()
    page = written(folder, tmp_path)
    assert "<h1>b</h1>" in page and "(source)" not in page


def test_nothing_breaks_a_phone(job: Path, tmp_path: Path) -> None:
    page = write_report([job], tmp_path / "report.html")
    with chromium() as browser:
        view = browser.new_page(viewport={"width": 400, "height": 800})
        view.goto(page.as_uri())
        assert view.evaluate("document.documentElement.scrollWidth") <= 400
        wide = "[...document.querySelectorAll('.scroll')].some(box => box.scrollWidth > box.clientWidth)"
        assert view.evaluate(wide)  # a table that is wider scrolls
