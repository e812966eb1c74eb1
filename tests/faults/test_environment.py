"""What a run takes from the environment works, and stands in none of the files that it leaves."""

import json
from pathlib import Path

import pytest

from llmprune.config.job_files import load_training_job
from llmprune.conversion.commands import convert
from llmprune.jobs.train import train
from llmprune.reporting.page import write_report
from llmprune.utils.errors import UserError


@pytest.fixture
def yaml(data: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job whose data and model lie in a folder that only the environment names."""
    (tmp_path / "hunter2").mkdir()
    (tmp_path / "hunter2/data").symlink_to(data)
    (tmp_path / "hunter2/model").symlink_to(model_folder)
    monkeypatch.setenv("PLACE", str(tmp_path / "hunter2"))
    path = tmp_path / "job.yaml"
    path.write_text(f"""
run: {{name: test, folder: {tmp_path}/run, seed: 3}}
model: {{path: "${{oc.env:PLACE}}/model"}}
data: {{path: "${{oc.env:PLACE}}/data", eval_samples_per_domain: 2}}
distillation: {{teacher: "${{oc.env:PLACE}}/model"}}
train: {{duration: 1ba, global_batch_size: 2, microbatch_size: 2}}
loggers: {{console: false, tensorboard: true}}
""")
    return path


def test_the_environment_stays_out_of_every_file(yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(load_training_job(yaml))
    train(load_training_job(tmp_path / "run/config.yaml", ["run.autoresume=true", "train.duration=2ba"]))
    convert(tmp_path / "run", tmp_path / "out")
    write_report([tmp_path / "run", tmp_path / "out"], tmp_path / "report.html")
    files = [path for place in ("run", "out") for path in (tmp_path / place).rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in (*files, tmp_path / "report.html") if b"hunter2" in path.read_bytes()] == []
    manifest = json.loads((tmp_path / "run/checkpoints/manifest.json").read_text())
    assert manifest["source"] == manifest["sections"]["distillation"]["teacher"] == "${oc.env:PLACE}/model"
    assert manifest["data"]["path"] == "${oc.env:PLACE}/data"
    monkeypatch.delenv("PLACE")
    with pytest.raises(UserError, match="PLACE"):
        load_training_job(tmp_path / "run/config.yaml")


def test_nothing_of_the_environment_gets_into_an_exported_model(
    yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest from anybody that asks for a password."""
    train(load_training_job(yaml))
    monkeypatch.setenv("DB_PASSWORD", "swordfish")
    path = tmp_path / "run/checkpoints/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["source"] = manifest["data"]["path"] = "${oc.env:DB_PASSWORD}"
    path.write_text(json.dumps(manifest))
    convert(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "${oc.env:DB_PASSWORD}" in card and "swordfish" not in card
