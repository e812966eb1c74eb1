"""Tasks of lm-eval: the same figures as its own command, on a task that needs no network."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llmprune.cli import app
from llmprune.evaluation.settings import TasksConfig
from llmprune.evaluation.stability import read_answers, stability
from llmprune.evaluation.suites import SUITES, TaskRun, expand
from llmprune.evaluation.tasks import Tasks, language_model, task_manager
from llmprune.models.loaded import open_model
from llmprune.models.placement import Placement
from llmprune.utils.errors import UserError
from tests.evaluation.local_task import make_task


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    make_task(folder)
    make_task(folder, "arc_easy_local", 6)
    return folder


def test_equals_the_harness_itself(tasks: Path, trained_folder: Path, model_folder: Path, tmp_path: Path) -> None:
    """One call for two models, against lm-eval's command for one of them (alone, not as a rank of something)."""
    arguments = ("--tasks", "counting", "--include_path", str(tasks), "--num_fewshot", "2", "--log_samples")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={trained_folder}"]
    done = subprocess.run(
        [*command, *arguments, "--device", "cpu", "--batch_size", "4", "--output_path", str(tmp_path / "theirs")],
        capture_output=True,
        text=True,
        timeout=300,
        env={name: value for name, value in os.environ.items() if not name.endswith(("RANK", "WORLD_SIZE"))},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (theirs,) = (tmp_path / "theirs").rglob("results_*.json")
    wanted = json.loads(theirs.read_text())["results"]["counting"]

    out = tmp_path / "results.json"
    ours = ("--tasks", "counting", "--include-path", str(tasks), "--num-fewshot", "2", "--out", str(out))
    app(["evaluate", str(trained_folder), str(model_folder), *ours], standalone_mode=False)
    models = json.loads(out.read_text())["models"]
    found = models[str(trained_folder)]["tasks"]["counting"]
    assert found["acc"] == wanted["acc,none"] and found["acc_norm"] == wanted["acc_norm,none"]
    assert found["num_fewshot"] == 2

    # The logs have the same likelihood of every option, and give the same stability, whoever wrote them.
    logs = {folder: next(path for path in (tmp_path / "results.samples").iterdir() if folder.name in path.name)
            for folder in (trained_folder, model_folder)}  # fmt: skip
    tokenizer = open_model(str(trained_folder), Placement(device="cpu")).tokenizer
    after = read_answers(logs[model_folder])
    own, harness = read_answers(logs[trained_folder]), read_answers(tmp_path / "theirs", tokenizer)
    for question, answer in own["counting"].items():
        assert answer.correct == harness["counting"][question].correct
        assert answer.losses == pytest.approx(harness["counting"][question].losses, rel=1e-5)
    assert stability(own, own).overall == pytest.approx(100)
    assert stability(own, after).overall == pytest.approx(stability(harness, after).overall, rel=1e-6)


def test_shots_limits_and_random_state(
    tasks: Path, trained_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmprune.utils.progress.SECONDS", 1e-9)
    opened = open_model(str(trained_folder), Placement(device="cpu"))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    chosen = Tasks(TasksConfig(["counting"], limit=4, include_path=str(tasks)))
    chosen.runs = [TaskRun("counting", 0), TaskRun("counting", 3)]
    results = chosen.run(language_model(opened.model, opened.tokenizer, batch_size="auto"))
    assert results is not None and set(results.tasks) == {"counting@0", "counting@3"}
    assert [len(samples) for samples in results.samples.values()] == [4, 4]
    assert capsys.readouterr().err.count("loglikelihood: 12 of 12 (100 %) requests, ") == 2  # three options each
    shown = [samples[0]["arguments"][0][0] for samples in results.samples.values()]
    assert len(shown[1].split()) > len(shown[0].split())  # three more questions with answers
    assert before[:2] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    assert torch.equal(before[2], torch.get_rng_state())


def test_parts_of_a_group_at_several_shots(tmp_path: Path, trained_folder: Path) -> None:
    make_task(tasks := tmp_path / "tasks")
    (tasks / "pair.yaml").write_text("group: pair\ntask: [counting]\n")
    opened = open_model(str(trained_folder), Placement(device="cpu"))
    chosen = Tasks(TasksConfig(["pair"], limit=2, include_path=str(tasks)))
    chosen.runs = [TaskRun("pair", 0), TaskRun("pair", 3)]
    results = chosen.run(language_model(opened.model, opened.tokenizer, batch_size=2))
    assert results is not None and {"counting@0", "counting@3"} <= set(results.tasks)
    assert set(results.samples) == {"counting@0", "counting@3"}
    assert "sample_len" not in results.tasks["counting@0"]


def test_suites() -> None:
    assert [run.task for run in SUITES["commonsense7"]] == [
        "boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"
    ]  # fmt: skip
    assert [len(SUITES[name]) for name in ("reassessing8", "streamline7")] == [8, 7]
    sheared = {(run.task, run.shots) for run in SUITES["sheared"]}
    assert {("arc_challenge", 25), ("hellaswag", 10), ("mmlu", 5), ("boolq", 32), ("gsm8k", 8), ("sciq", 0)} <= sheared
    assert expand(["commonsense7", "piqa"], 3) == [TaskRun(run.task, 3) for run in SUITES["commonsense7"]]
    assert expand(["boolq", "commonsense7", "sciq"]) == [*SUITES["commonsense7"], TaskRun("sciq")]
    chosen = Tasks(TasksConfig([]))
    found = {run.task: {"acc": 0.5, "acc_norm": 0.9, "num_fewshot": 0} for run in SUITES["commonsense7"]}
    assert chosen._average("commonsense7", found) == pytest.approx((3 * 0.9 + 4 * 0.5) / 7)


def test_every_task_of_the_suites_exists() -> None:
    known = task_manager(None).all_tasks
    assert {run.task for suite in SUITES.values() for run in suite} <= set(known)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TasksConfig(["arc_eazy"]), "did you mean 'arc_easy'"),
        (TasksConfig(["hellaswag"]), "the task 'hellaswag' can't be loaded"),
        (TasksConfig(["counting"], limit=0), "limit is 0"),
        (TasksConfig(["counting"], limit=1.5), "a positive whole number or a share"),
        (TasksConfig(["counting"], num_fewshot=-1), "num_fewshot is -1"),
        (TasksConfig(["counting"], include_path="nowhere"), "no folder"),
    ],
)
def test_mistakes(config: TasksConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Tasks(config)


def test_what_can_not_be_run_is_refused_before_any_work(tmp_path: Path) -> None:
    make_task(tasks := tmp_path / "tasks")
    writing = (tasks / "counting.yaml").read_text().replace("multiple_choice", "generate_until")
    writing = writing[: writing.index("metric_list")].replace("task: counting", "task: writing")
    writing += 'metric_list: [{metric: exact_match}]\ngeneration_kwargs: {until: ["."]}\n'
    (tasks / "writing.yaml").write_text(writing.replace('doc_to_choice: "{{choices}}"\n', ""))
    (tasks / "running.yaml").write_text(
        (tasks / "writing.yaml").read_text().replace("writing", "running") + "unsafe_code: true\n"
    )
    (tasks / "both.yaml").write_text("group: both\ntask: [counting, writing]\n")
    Tasks(TasksConfig(["both"], include_path=str(tasks)))
    with pytest.raises(UserError, match="'both' generates text"):
        Tasks(TasksConfig(["both"], include_path=str(tasks)), generate=False)
    with pytest.raises(UserError, match="'running' runs code that the model wrote"):
        Tasks(TasksConfig(["running"], include_path=str(tasks)))


def test_code_of_task_files_runs_only_when_their_folder_is_named(
    tmp_path: Path, trained_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(trained_folder, tmp_path / "model")
    make_task(model, "doubling")  # as a downloaded folder might hold it
    task = model / "doubling.yaml"
    task.write_text(task.read_text() + "process_docs: !function payload.run\n")
    (model / "payload.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\ndef run(docs):\n    return docs\n"
    )
    monkeypatch.chdir(model)
    with pytest.raises(UserError, match="there is no task or suite 'doubling'"):
        app(["evaluate", str(model), "--tasks", "doubling"], standalone_mode=False)
    assert not (tmp_path / "ran").exists() and "Python code" not in caplog.text
    for _ in range(2):
        Tasks(TasksConfig(["doubling"], include_path=str(model)))
    assert (tmp_path / "ran").exists()
    said = [record.getMessage() for record in caplog.records if "Python code" in record.getMessage()]
    assert len(said) == 1 and "doubling.yaml: payload.run" in said[0]


def test_more_shots_than_there_are(tasks: Path, trained_folder: Path) -> None:
    opened = open_model(str(trained_folder), Placement(device="cpu"))
    chosen = Tasks(TasksConfig(["counting"], num_fewshot=100, include_path=str(tasks)))
    with pytest.raises(UserError, match="fewer examples than the 100 shots"):
        chosen.run(language_model(opened.model, opened.tokenizer, batch_size=4))
