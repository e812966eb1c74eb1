"""Dynamic mixing in whole runs: the mix follows the losses, and a killed run goes on with the same samples."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from composer import Callback
from composer.core import State
from composer.loggers import Logger

from llmprune.callbacks.dynamic_loading import DynamicLoading
from llmprune.config.job_files import load_training_job
from llmprune.config.schema import Config
from llmprune.jobs.train import train
from llmprune.training.checks import check
from llmprune.training.trainer import build_trainer
from llmprune.utils.errors import UserError
from tests.callbacks.fixed_noise import KillAt, Killed

Samples = list[list[int]]


@pytest.fixture
def yaml(data: Path, trained_folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "references.json").write_text('{"references": {"letters": 0.5, "numbers": 9.0}}')
    path = tmp_path / "continue.yaml"
    path.write_text(f"""
run: {{name: test, folder: {tmp_path}/run, seed: 3}}
model: {{path: {trained_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2, workers: 2, prefetch: 1}}
dynamic_loading: {{references: {tmp_path}/references.json, update_delay: 2, ceiling: 0.9}}
optimizer: {{lr: 1.0e-4}}
train: {{duration: 16ba, global_batch_size: 8, microbatch_size: 8, eval_interval: 3ba}}
checkpoint: {{interval: 2ba}}
loggers: {{console: false}}
""")
    return path


class Recorder(Callback):
    """Keeps every batch's domains and first tokens."""

    def __init__(self) -> None:
        self.seen: dict[int, Samples] = {}

    def batch_start(self, state: State, logger: Logger) -> None:
        batch = state.batch
        rows = [[int(d), *tokens[:4].tolist()] for d, tokens in zip(batch["domain"], batch["input_ids"], strict=True)]
        self.seen[state.timestamp.batch.value] = rows


def run(config: Config, kill: int | None = None) -> dict[int, Samples]:
    trainer, recorder = build_trainer(config), Recorder()
    trainer.state.callbacks.append(recorder)
    if kill is None:
        trainer.fit()
    else:
        trainer.state.callbacks.append(KillAt(kill))
        with pytest.raises(Killed):
            trainer.fit()
    trainer.close()
    return recorder.seen


def metrics(folder: Path, prefix: str) -> list[tuple[int, dict[str, Any]]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [(line["batch"], {k: v for k, v in line.items() if k.startswith(prefix)}) for line in lines]
    return [(batch, values) for batch, values in found if values]


def test_the_mix_follows_the_losses_and_survives_a_kill(yaml: Path, tmp_path: Path) -> None:
    whole = run(load_training_job(yaml))
    share = [sum(row[0] == 0 for row in rows) / 8 for rows in whole.values()]
    before, after = sum(share[:5]) / 5, sum(share[5:]) / 11
    assert after > before + 0.05  # of the domain that is far above its reference, from batch 3 + 2 on
    weights = dict(metrics(tmp_path / "run", "mixing/weight/"))
    assert list(weights) == [0, 3, 6, 9, 12, 15, 16]  # at the end too
    assert all(values["mixing/weight/letters"] <= 0.9 for values in weights.values())
    samples = dict(metrics(tmp_path / "run", "mixing/samples/"))[15]
    assert samples["mixing/samples/letters"] == sum(row[0] == 0 for b in range(15) for row in whole[b])
    for number, killed in enumerate((4, 7, 13)):  # with a change announced, with none, and near the end
        folder = f"run.folder={tmp_path}/killed{number}"
        first = run(load_training_job(yaml, [folder]), kill=killed)
        workers = ["data.workers=0", "data.workers=1", "data.workers=2"][number]
        second = run(load_training_job(yaml, [folder, "run.autoresume=true", workers]))
        assert {**first, **second} == whole and min(second) <= killed
        assert dict(metrics(tmp_path / f"killed{number}", "mixing/weight/")) == weights


def test_the_picture_and_the_config_keep_what_was_done(yaml: Path, tmp_path: Path) -> None:
    train(load_training_job(yaml, ["train.duration=4ba"]))
    assert (tmp_path / "run/weights.png").stat().st_size > 5000
    assert (tmp_path / "run/weights.csv").read_text().startswith("batch,tokens,domain,weight")
    assert "numbers: 9.0" in (tmp_path / "run/config.yaml").read_text()  # not the file, which may change


def test_a_loss_that_is_no_number_changes_nothing(yaml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = build_trainer(load_training_job(yaml, ["train.duration=8ba"]))
    (dynamic,) = (c for c in trainer.state.callbacks if isinstance(c, DynamicLoading))
    before = dynamic._dataset.weights

    class Spoil(Callback):
        def eval_end(self, state: State, logger: Logger) -> None:
            state.eval_metric_values["loss/letters"] = float("nan")

    trainer.state.callbacks.insert(trainer.state.callbacks.index(dynamic), Spoil())
    trainer.fit()
    trainer.close()
    assert dynamic._dataset.weights == before
    assert "letters nan" in caplog.text
    assert [batch for batch, _ in metrics(tmp_path / "run", "mixing/skipped")] == [3, 6, 8]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.prefetch=2"], "update_delay is 2, but 4 batches may be loaded already"),
        (["train.eval_interval=0ba"], "set train.eval_interval"),
        (["dynamic_loading.references={letters: 1.0}"], "no loss for the domain 'numbers'"),
        (["dynamic_loading.references=nowhere.json"], "nowhere.json does not exist"),
        (["dynamic_loading.references=null"], "needs dynamic_loading.references"),
        (["dynamic_loading.update=doremy"], "did you mean 'doremi'"),
        (["dynamic_loading.etta=1"], "did you mean 'eta'"),
    ],
)
def test_mistakes(yaml: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(load_training_job(yaml, overrides))


def test_no_evaluation_samples(yaml: Path, data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(data, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["domains"]["letters"]["eval"]["samples"] = 0
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="needs two domains with evaluation samples"):
        check(load_training_job(yaml, [f"data.path={copy}"]))


def test_a_schedule_has_the_weights_of_the_whole_run(yaml: Path) -> None:
    points = "[{at: 0, weights: {letters: 1}}, {at: 1, weights: {numbers: 1}}]"
    overrides = ["dynamic_loading.update=schedule", f"dynamic_loading.schedule={points}", "dynamic_loading.ceiling=1.0"]
    seen = run(load_training_job(yaml, overrides))
    shares = [sum(row[0] for row in seen[batch]) / 8 for batch in range(16)]
    assert shares[:3] == [0.0] * 3 and shares[-1] > 0.5
    with pytest.raises(UserError, match="leave data.weights out"):
        check(load_training_job(yaml, [*overrides, "data.weights={letters: 1, numbers: 1}"]))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("{nope: 1}", "data.weights names the domain 'nope'"),
        ("{letters: -1}", "non-negative"),
        ("{letters: 0}", "not all zero"),
        ("{letters: 1}", "two domains that are drawn from"),
        ("[1]", "a list was given in place of names"),
    ],
)
def test_wrong_weights_are_blamed_on_themselves(yaml: Path, weights: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(load_training_job(yaml, [f"data.weights={weights}"]))
