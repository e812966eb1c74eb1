"""The report: what it finds, what it shows, and that it stands alone."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune.cli import app
from llmprune.conversion.commands import apply
from llmprune.jobs.score import save_scores, score
from llmprune.models.loading import load_model_config
from llmprune.models.placement import Placement
from llmprune.models.stored_weights import StoredWeights, fingerprint
from llmprune.plans.plan import KeptBlock, Plan
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.reporting.collect import collect
from llmprune.reporting.figures import picture_of_plan
from llmprune.reporting.page import write_report
from llmprune.utils.errors import UserError
from tests.harness.browser import chromium

RESULTS = {
    "schema": 1,
    "models": {
        "a/base": {"parameters": 2000000, "perplexity": {"text": {"bos_once": 10.0, "bos_each": 9.0}},
                   "tasks": {"arc": {"acc": 0.5, "acc_stderr": 0.1, "num_fewshot": 0}}},
        "a/cut": {"parameters": 1000000, "perplexity": {"text": {"bos_once": 12.0, "bos_each": 11.0}}},
    },
    "command": "llmprune evaluate a/base a/cut",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(trained_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an unfinished pruning run, a cut model, scores, results and continuations."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "prune").mkdir()
    (folder / "prune/config.yaml").write_text(
        "train: {duration: 40ba}\nmodel: {path: x}\nl0_pruning: {target: {layers: 4}}\n"
    )
    lines: list[dict[str, Any]] = [
        {"batch": n, "time/batch": n, "loss/train/total": 5 - n / 10, "l0/layer/expected_sparsity": n / 40,
         "l0/layer/target_sparsity": 0.25}
        for n in range(10)
    ]  # fmt: skip
    lines.append({"batch": 10, "metrics/eval/loss": 4.25, "metrics/eval/loss/a<b": 4.0, "metrics/eval/loss/c": 4.5})
    (folder / "prune/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = load_model_config(trained_folder)
    weights = StoredWeights(trained_folder)
    found = score(
        str(trained_folder), LayerScoringConfig(criteria=["tail", "magnitude_l1"]), Placement("float32", "cpu")
    )
    plan = Plan("llama", fingerprint(weights, config), found.source, tuple(KeptBlock.whole(i) for i in (0, 1, 2, 4)))
    apply(trained_folder, plan, folder / "cut")
    (folder / "scores").mkdir()
    save_scores(found, folder / "scores/scores.json")
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "results.samples/a_cut").mkdir(parents=True)
    record = {"prompt": "Once", "output": " <script>alert(1)</script>", "reference": None}
    (folder / "results.samples/a_cut/continuations.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def test_what_is_found(place: Path) -> None:
    found = collect([place, place / "scores/scores.json"])
    assert [run.name for run in found.runs] == ["prune"] and found.runs[0].progress == 0.25
    assert [(model.name, model.cut) for model in found.models] == [("cut", True)]
    assert len(found.scores) == 1 and len(found.results) == 1 and not found.speeds
    assert [r["output"] for r in found.continuations[str(place / "cut")]] == [" <script>alert(1)</script>"]


def test_the_page(place: Path, tmp_path: Path) -> None:
    out, plots = tmp_path / "report.html", tmp_path / "plots"
    arguments = ["report", str(place), str(place / "scores/scores.json"), "--out", str(out), "--plots", str(plots)]
    app(arguments, standalone_mode=False)
    page = out.read_text()
    assert "prune is not finished: 25% of 40ba" in page and "llmprune evaluate a/base a/cut" in page
    assert "composer train.py" in page and "layers 4 (6)" in page
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    outside = [url for url in re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', page) if "://" in url]
    assert all(url.startswith("http://www.w3.org/") for url in outside)  # names of XML, which nothing fetches
    names = {path.name for path in plots.iterdir()}
    assert {"prune-loss", "prune-sparsity", "prune-domains", "cut-plan", "results-quality-size", "scores-scores"} <= {
        name.removesuffix(".png") for name in names
    }
    assert {name.replace(".png", ".csv") for name in names if name.endswith(".png")} <= names
    sparsity = list(csv.DictReader((plots / "prune-sparsity.csv").open()))
    assert (sparsity[4]["expected"], sparsity[4]["target"]) == ("0.1", "0.25")
    assert next(iter(csv.DictReader((plots / "prune-domains.csv").open()))) == {
        "batch": "10",
        "domain": "a<b",
        "loss": "4.0",
    }


def test_in_a_browser(place: Path, tmp_path: Path) -> None:
    """Nothing overflows a phone's width, text is readable on dark ground, and nothing is fetched."""
    app(["report", str(place), "--out", str(tmp_path / "report.html")], standalone_mode=False)
    with chromium() as browser:
        for width, scheme in ((400, "dark"), (1280, "light")):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
            asked, errors = [], []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("pageerror", lambda error, errors=errors: errors.append(error))
            page.goto((tmp_path / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert [url for url in asked if not url.startswith(("file:", "data:"))] == [] == errors
            colour, ground = page.evaluate(
                "[getComputedStyle(document.querySelector('svg text')).fill,"
                " getComputedStyle(document.body).backgroundColor]"
            )
            light = [sum(map(int, re.findall(r"\d+", one)[:3])) / 3 for one in (colour, ground)]
            assert abs(light[0] - light[1]) > 150
            sizes = page.evaluate("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)")
            assert min(sizes) > 300


def test_a_plan_picture_counts(place: Path) -> None:
    plan = collect([place]).models[0].plan
    assert plan is not None
    rows = picture_of_plan(plan, "cut").rows
    assert [row["heads"] for row in rows] == [8, 8, 8, 0, 8, 0] and [row["channels"] for row in rows][3:] == [0, 48, 0]


def test_a_run_that_was_killed_before_its_first_batch(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text("train: {duration: 40ba}\nmodel: {path: x}\n")
    app(["report", str(tmp_path / "run"), "--out", str(tmp_path / "r.html")], standalone_mode=False)
    assert "run is not finished: 0% of 40ba" in (tmp_path / "r.html").read_text()


def test_mistakes(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([str(tmp_path / "empty")], "no run, model, plan, scores"),
        ([str(tmp_path / "nothing")], "does not exist"),
        ([str(place), "--plots", str(place)], "llmprune did not make"),
    ):
        with pytest.raises(UserError, match=message):
            app(["report", *arguments, "--out", str(tmp_path / "r.html")], standalone_mode=False)
    assert not (tmp_path / "r.html").exists()
    with pytest.raises(UserError, match=r"ends in \.html"):
        app(["report", str(place), "--out", str(tmp_path / "r.json")], standalone_mode=False)


def test_what_is_damaged_is_left_out(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(place, folder)
    for name, content in (
        ("notes.json", "{broken"),
        ("odd.json", '{"schema": 1, "models": {"a": 1}}'),
        ("foreign/config.yaml", "train: {lr: 1}"),
        ("torn/config.yaml", "train: [x"),
        ("model/config.json", "{}"),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    for run in ("foreign", "torn"):
        (folder / run / "metrics.jsonl").write_text("")
    (folder / "dangling.json").symlink_to("nowhere")
    material = collect([folder])
    assert sorted(path.name for path in material.left_out) == [
        "dangling.json", "foreign", "model", "notes.json", "odd.json", "torn"
    ]  # fmt: skip
    assert len(material.runs) == 1 and len(material.results) == 1
    text = write_report([folder], tmp_path / "report.html").read_text()
    assert "notes.json is left out" in text
    with pytest.raises(UserError, match="can.t be reported on: .*not valid JSON"):
        collect([folder / "notes.json"])


def test_same_names_in_two_places(place: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(place, tmp_path / name)
    write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "report.html", plots=tmp_path / "plots")
    write_report([tmp_path / "a"], tmp_path / "one.html", plots=tmp_path / "plots of one")
    one, both = ([path.name for path in (tmp_path / name).glob("[!.]*")] for name in ("plots of one", "plots"))
    assert len([name for name in both if "plan" in name]) == 2  # the same plan is drawn once, and so is its CSV written
    assert len([name for name in both if "plan" not in name]) == 2 * len([name for name in one if "plan" not in name])


def test_what_is_reported_on_is_not_replaced(place: Path, tmp_path: Path) -> None:
    for plots in (place, place / "prune", place.parent):
        with pytest.raises(UserError, match="would delete the input|llmprune did not make"):
            write_report([place / "prune"], tmp_path / "r.html", plots=plots, overwrite=True)
    assert (place / "prune/metrics.jsonl").is_file()


def test_the_command_for_a_model_whose_gates_were_trained(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "cut", tmp_path / "runs/gated")
    shutil.copytree(place / "prune", tmp_path / "runs/prune")
    plan = Plan.load(place / "cut/llmprune/plan.json")
    soft = replace(plan, factors={"attention": torch.full((4,), 0.5)})
    soft.save(tmp_path / "runs/gated/llmprune/plan.json")
    text = write_report([tmp_path / "runs"], tmp_path / "r.html").read_text()
    assert f"llmprune convert {tmp_path}/runs/prune --out ANOTHER" in text and "llmprune apply" not in text


def test_generated_alone(tmp_path: Path) -> None:
    found = {"schema": 1, "models": {}, "generated": {"g.jsonl": {"continuations": {"g": {"bleu": 12.5}}}}}
    (tmp_path / "r.json").write_text(json.dumps(found))
    assert "12.5" in write_report([tmp_path / "r.json"], tmp_path / "r.html").read_text()
