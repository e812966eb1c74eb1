"""The search under a budget: what it finds, going on after a stop, two ranks, mistakes."""

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmprune.config.job_files import load_job
from llmprune.config.schema import SearchConfig
from llmprune.conversion.verify import compare_models, open_for_comparison
from llmprune.data.dataset import EvalDataset
from llmprune.data.prepared import PreparedData
from llmprune.jobs import search as searching
from llmprune.jobs import stages
from llmprune.jobs.search import search
from llmprune.jobs.train import train
from llmprune.plans.plan import Plan
from llmprune.reporting.search_table import pareto_front
from llmprune.utils.errors import BrokenModelError, UserError
from tests.callbacks.fixed_noise import KillAt, Killed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def yaml(data: Path, trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    path = folder / "search.yaml"
    path.write_text(f"""
run: {{name: test, folder: {folder}/once, seed: 3}}
model: {{path: {trained_folder}}}
data: {{path: {data}, eval_samples_per_domain: 4}}
job: search
search:
  criteria: [block_influence, cosine]
  remove: [0, 1, 2]
  unit_criteria: [unit_taylor]
  shapes: [{{}}, {{layers: 5, hidden: 24, intermediate: 40}}]
  budget: {{params: "0.75", context: 64, dtype: float32, tries: 5, multiple: 8}}
  best: 2
plan: {{correction: refit}}
layer_scoring: {{data: {{samples: 16, length: 24}}}}
optimizer: {{lr: 1.0e-3}}
scheduler: {{warmup: 1ba}}
train: {{duration: 4ba, global_batch_size: 8, microbatch_size: 4, eval_interval: 0ba}}
checkpoint: {{interval: 2ba}}
loggers: {{console: false}}
""")
    return path


def job(yaml: Path, *overrides: str) -> SearchConfig:
    loaded = load_job(yaml, overrides)
    assert isinstance(loaded, SearchConfig)
    return loaded


def rows_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "candidates.json").read_text())["candidates"]
    return found


@pytest.fixture(scope="module")
def once(yaml: Path) -> Path:
    """The folder of an undisturbed job."""
    search(job(yaml))
    return yaml.parent / "once"


def test_figures_are_those_of_the_models(once: Path, data: Path, trained_folder: Path) -> None:
    rows = rows_of(once)
    assert len(rows) == 4 + 2 + 5
    source = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(trained_folder).parameters())
    recovered = [row for row in rows if "recovered" in row]
    assert len(recovered) == 2
    samples = EvalDataset(PreparedData(data), 4)
    tokens = torch.stack([samples[place]["input_ids"] for place in range(len(samples))])
    for row in recovered:
        (place,) = (once / "candidates").glob(f"{row['number']:02}_*")
        model = AutoModelForCausalLM.from_pretrained(place / "recovered").eval()
        assert row["parameters"] == sum(p.numel() for p in model.parameters()) <= 0.75 * source
        with torch.no_grad():
            loss = model(input_ids=tokens, labels=tokens).loss.item()
        assert row["recovered"]["loss"] == pytest.approx(loss, abs=1e-5)
        plan = Plan.load(place / "plan.json")
        cut = open_for_comparison(place / "pruned")
        assert compare_models(open_for_comparison(trained_folder, plan), cut, length=48).max_rel <= 1e-5


def test_the_best_few_within_the_budget_are_recovered(once: Path, trained_folder: Path) -> None:
    rows = rows_of(once)
    fitting = [row for row in rows if row.get("within") and row["same_as"] is None]
    best = sorted(fitting, key=lambda row: row["calibration_loss"])[:2]
    assert {row["number"] for row in best} == {row["number"] for row in rows if "recovered" in row}
    winner = min(best, key=lambda row: row["recovered"]["loss"])
    (place,) = (once / "candidates").glob(f"{winner['number']:02}_*")
    assert Plan.load(once / "plan.json").blocks == Plan.load(place / "plan.json").blocks
    kept, found = load_file(once / "model" / "model.safetensors"), load_file(place / "recovered" / "model.safetensors")
    assert all(torch.equal(kept[name], found[name]) for name in kept)
    assert (once / "table.md").read_text().splitlines()[2].startswith(f"| {winner['decided_by']} |")
    assert (once / "search.png").stat().st_size > 10_000 and (once / "search.csv").exists()
    over = next(row for row in rows if row["decided_by"] == "block_influence, without 1 blocks")
    assert not over["within"] and over["calibration_loss"] > 0


@pytest.mark.parametrize("stop", ["comparing", "training", "exporting", "measuring"])
def test_a_stopped_job_goes_on_where_it_was(
    yaml: Path, once: Path, tmp_path: Path, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [f"run.folder={tmp_path}/job"]
    with monkeypatch.context() as patch:
        if stop == "training":
            runs: list[Any] = []

            def killing(config: Any) -> Any:
                runs.append(config)
                return train(config, [KillAt(3)] if len(runs) == 2 else [])

            patch.setattr(stages, "train", killing)
        else:
            module, name, last = {
                "comparing": (searching, "make_plan", 4),
                "exporting": (stages, "convert", 2),
                "measuring": (searching, "evaluate_losses", 2),
            }[stop]
            real, calls = getattr(module, name), []

            def failing(*args: Any, **kwargs: Any) -> Any:
                calls.append(args)
                if len(calls) == last:
                    raise Killed
                return real(*args, **kwargs)

            patch.setattr(module, name, failing)
        with pytest.raises(Killed):
            search(job(yaml, *overrides))
    before = len(rows_of(tmp_path / "job"))
    assert before == (3 if stop == "comparing" else 11)
    with pytest.raises(UserError, match="run.autoresume=true"):
        search(job(yaml, *overrides))
    search(job(yaml, *overrides, "run.autoresume=true"))
    timed = ("latency", "measured_latency")
    expected, found = (
        [{key: value for key, value in row.items() if key not in timed} for row in rows_of(folder)]
        for folder in (once, tmp_path / "job")
    )
    assert found == expected
    kept, again = (load_file(folder / "model" / "model.safetensors") for folder in (once, tmp_path / "job"))
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    search(job(yaml, *overrides, "run.autoresume=true"))  # nothing is left to do


def test_after_a_short_recovery_the_better_half_goes_on(yaml: Path, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    given = [f"run.folder={folder}", "search.best=3", "search.rungs=[0.25, 0.5]", "scheduler.warmup=0ba"]
    search(job(yaml, *given))
    rows = [row for row in rows_of(folder) if "rungs" in row]
    by_calibration = sorted(
        (row for row in rows_of(folder) if row.get("within") and row["same_as"] is None),
        key=lambda row: row["calibration_loss"],
    )
    assert {row["number"] for row in rows} == {row["number"] for row in by_calibration[:3]}
    assert sorted(len(row["rungs"]) for row in rows) == [1, 2, 2]
    second = [row for row in rows if len(row["rungs"]) == 2]
    (left,) = (row for row in rows if len(row["rungs"]) == 1)
    assert all(row["rungs"][0] <= left["rungs"][0] for row in second)
    winner = min(second, key=lambda row: row["rungs"][1])
    assert [row["number"] for row in rows_of(folder) if "recovered" in row] == [winner["number"]]
    assert winner["recovered"]["loss"] < winner["rungs"][0] < winner["cut"]["loss"]
    assert not list(folder.glob("candidates/*/rung-*"))
    before = rows_of(folder)
    search(job(yaml, *given, "run.autoresume=true"))
    assert rows_of(folder) == before


def test_two_ranks(yaml: Path, once: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "composer"), "-n", "2", "train.py", str(yaml)]
    done = subprocess.run(
        [*command, f"run.folder={tmp_path}/job"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for one, two in zip(rows_of(once), rows_of(tmp_path / "job"), strict=True):
        assert one["shape"] == two["shape"] and ("recovered" in one) == ("recovered" in two)
        assert two["calibration_loss"] == pytest.approx(one["calibration_loss"], rel=1e-4)
        if "recovered" in one:
            assert two["recovered"]["loss"] == pytest.approx(one["recovered"]["loss"], rel=1e-4)


def test_measured_latency_decides(yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table says that all are fast, built models say which are."""
    from llmprune.pruning.budgets.latency import LatencyTable

    def measured(table: LatencyTable, shape: Any, reference: Any) -> float:
        return 0.5 if shape.layers <= 4 else 0.9

    monkeypatch.setattr(LatencyTable, "seconds", lambda table, shape: 1.0 if shape == table.source else 0.6)
    monkeypatch.setattr(LatencyTable, "measured", measured)
    budget = "search.budget={latency: 0.7, context: 64}"
    search(job(yaml, f"run.folder={tmp_path}/job", budget, "search.under_budget=false"))
    recovered = [row for row in rows_of(tmp_path / "job") if "recovered" in row]
    assert recovered and all(row["shape"]["layers"] <= 4 and row["measured_latency"] == 0.5 for row in recovered)
    slow = [row for row in rows_of(tmp_path / "job") if row.get("measured_latency") == 0.9]
    assert slow and not any(row["within"] for row in slow)


def test_a_candidate_that_fails_is_left_out(
    yaml: Path, once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One recovery stops with an error, the next ends in no number: neither wins, and going on changes nothing."""
    best = [row["number"] for row in rows_of(once) if "recovered" in row]
    settings = [f"run.folder={tmp_path}/job", "search.best=3", "run.autoresume=true"]
    train, real = stages.train, searching.evaluate_losses

    def failing(config: Any) -> Any:
        if f"{best[0]:02}_" in config.run.folder:
            raise BrokenModelError("the loss is nan at batch 3")
        return train(config)

    def broken(model: Any, *args: Any, **kwargs: Any) -> Any:
        found = real(model, *args, **kwargs)
        return replace(found, loss=float("nan")) if f"/{best[1]:02}_" in str(model.name_or_path) else found

    monkeypatch.setattr(stages, "train", failing)
    monkeypatch.setattr(searching, "evaluate_losses", broken)
    for _ in range(2):
        search(job(yaml, *settings))
        rows = {row["number"]: row for row in rows_of(tmp_path / "job")}
        assert "batch 3" in rows[best[0]]["failed"] and "no number" in rows[best[1]]["failed"]
        (winner,) = (row for row in rows.values() if "recovered" in row)
        assert (tmp_path / "job" / "table.md").read_text().splitlines()[2].startswith(f"| {winner['decided_by']} |")


def test_an_error_of_the_place_condemns_no_candidate(
    yaml: Path, once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that can't be reached says nothing of a candidate: the job ends, and goes on when it is there again."""

    def failing(config: Any) -> Any:
        raise UserError("the store can't be reached")

    settings = [f"run.folder={tmp_path}/job", "run.autoresume=true"]
    with monkeypatch.context() as patch:
        patch.setattr(stages, "train", failing)
        with pytest.raises(UserError, match="store"):
            search(job(yaml, *settings))
    assert not any("failed" in row for row in rows_of(tmp_path / "job"))
    search(job(yaml, *settings))
    assert [row["number"] for row in rows_of(tmp_path / "job") if "recovered" in row] == [
        row["number"] for row in rows_of(once) if "recovered" in row
    ]


def test_nothing_that_is_read_is_deleted(yaml: Path, once: Path, tmp_path: Path) -> None:
    shutil.copytree(once, tmp_path / "job")
    settings = ["run.overwrite=true", f"model.path={tmp_path}/job/model", "search.shapes=[]", "search.remove=[1]"]
    with pytest.raises(UserError, match="would delete the input"):
        search(job(yaml, f"run.folder={tmp_path}/job", *settings))
    assert (tmp_path / "job" / "model" / "config.json").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        search(job(yaml, f"run.folder={tmp_path}/file"))
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".config.yaml.llmprune-01234567.tmp").touch()  # as a kill leaves it
    with pytest.raises(UserError, match="no candidate keeps"):
        search(job(yaml, f"run.folder={tmp_path}/killed", "search.budget={params: 0.2}", "search.under_budget=false"))


def test_the_front_is_that_of_a_naive_comparison() -> None:
    rng = random.Random(0)
    for _ in range(50):
        points = [(rng.randint(0, 6), rng.randint(0, 6)) for _ in range(rng.randint(1, 12))]
        front = set(pareto_front(points))
        for place, (cost, loss) in enumerate(points):
            beaten = False
            for other_cost, other_loss in points:
                better = other_cost < cost or other_loss < loss
                if other_cost <= cost and other_loss <= loss and better:
                    beaten = True
            assert (place in front) == (not beaten)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["search.budget={}"], "name a budget"),
        (["search.budget={params: 1.0}"], "nothing needs to go"),
        (["search.budget={params: 12 apples}"], "is no budget"),
        (["search.budget={params: 0.5, vocabulary: 280}"], "cut the vocabulary first"),
        (["search.budget.parms=0.5"], "did you mean 'params'"),
        (["search.criteria=[perplexty]"], "did you mean 'perplexity'"),
        (["search.unit_criteria=[perplexity]"], "perplexity"),
        (["search.criteria=[attention]", "search.remove=[]", "search.shapes=[]"], "attention"),
        (["plan.protect_first=6", "search.remove=[]", "search.shapes=[]"], "protected"),
        (["search.budget.multiple=1000"], "is a multiple of 1000"),
        (["trainable={parameters: [block.9]}"], "there is no part 'block.9'"),
        (["distillation={teacher: somewhere, plan: plan.json}"], "leave out distillation.plan"),
        (["data.path=s3://bucket/data"], "layer_scoring.data.path"),
        (["search.rungs=[0.5, 0.2]"], "must be ascending"),
        (["search.rungs=[0.25]"], "scheduler.warmup 1ba is as long as the recovery of search.rungs 0.25"),
        (["search.remove=[6]"], "6 of 6 blocks can't be removed"),
        (["search.shapes=[{hidden: 64}]"], "must lie between 1 and the source's 32"),
        (["search.shapes=[{hiden: 16}]"], "a shape has no 'hiden'"),
        (["search.shapes=[{intermediate: 40, vocabulary: 280}]"], "cut the vocabulary first"),
        (["plan.correction=mean"], "has no biases"),
        (["layer_scoring.criteria=[perplexty]"], "did you mean 'perplexity'"),
        (["plan.merge_size=2"], "leave out plan.merge_size: search decides it"),
        (["search.criteria=[]", "search.unit_criteria=[]", "search.shapes=[]", "search.remove=[]"], "no candidates"),
        (["model.path=null", "model.config={model_type: llama}"], "name it with model.path"),
        (["l0_pruning.target_sparsity=0.5"], "leave out l0_pruning"),
    ],
)
def test_mistakes(yaml: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        search(job(yaml, f"run.folder={tmp_path}/job", *overrides))
    assert not (tmp_path / "job").exists()


def test_no_candidate_keeps_to_the_budget(yaml: Path, tmp_path: Path) -> None:
    tight = ["search.budget={params: 0.2}", "search.under_budget=false"]
    with pytest.raises(UserError, match="no candidate keeps to the budget"):
        search(job(yaml, f"run.folder={tmp_path}/job", *tight))


def test_another_job_is_not_gone_on_with(yaml: Path, once: Path) -> None:
    changed = replace(job(yaml, "run.autoresume=true").search, best=3)
    with pytest.raises(UserError, match="was begun with search.best 2; the config asks for 3"):
        search(replace(job(yaml, "run.autoresume=true"), search=changed))


def test_data_that_were_moved_are_the_same_data(yaml: Path, once: Path, data: Path, tmp_path: Path) -> None:
    moved, copy = shutil.copytree(data, tmp_path / "moved"), shutil.copytree(once, tmp_path / "job")
    (copy / "table.md").unlink()
    search(job(yaml, f"run.folder={copy}", "run.autoresume=true", f"data.path={moved}"))
    assert (copy / "table.md").read_text() == (once / "table.md").read_text()
