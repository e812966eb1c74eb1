"""A job finds the folder of its model once."""

from collections import Counter
from pathlib import Path

import pytest

from llmprune.config.job_files import load_training_job
from llmprune.conversion.commands import apply
from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.jobs.score import score
from llmprune.models import source
from llmprune.models.loaded import open_model
from llmprune.models.placement import Placement
from llmprune.models.source import ModelFolder, find_folder
from llmprune.pruning.planning import make_plan
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.training.trainer import build_trainer

CPU = Placement("float32", "cpu")


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each folder is looked at."""
    found: Counter[str] = Counter()

    def counting(folder: Path) -> Path:
        found[folder.name] += 1
        return known(folder)

    known = source._known
    monkeypatch.setattr(source, "_known", counting)
    return found


def test_a_folder_that_was_found_is_taken_as_it_is(trained_folder: Path, looks: Counter[str]) -> None:
    folder = find_folder(trained_folder)
    assert folder == ModelFolder(str(trained_folder), trained_folder) and find_folder(folder) is folder
    assert looks == {trained_folder.name: 1}


@pytest.mark.parametrize("offload", [False, True])
def test_scoring_and_cutting(
    trained_folder: Path, data: Path, tmp_path: Path, looks: Counter[str], offload: bool
) -> None:
    config = LayerScoringConfig(CalibrationConfig(str(data), 2, 16), ["block_influence"])
    scores = score(str(trained_folder), config, CPU, offload=offload)
    assert looks.pop(trained_folder.name) == 1
    plan = make_plan(scores, PlanConfig(criterion="block_influence", remove=1))
    looks.clear()
    apply(trained_folder, plan, tmp_path / "cut")
    assert looks[trained_folder.name] == 1


def test_opening(trained_folder: Path, looks: Counter[str]) -> None:
    open_model(str(trained_folder), CPU)
    assert looks == {trained_folder.name: 1}


def test_training(trained_folder: Path, data: Path, tmp_path: Path, looks: Counter[str]) -> None:
    yaml = tmp_path / "job.yaml"
    yaml.write_text(f"""
run: {{name: test, folder: {tmp_path}/run}}
model: {{path: {trained_folder}}}
data: {{path: {data}}}
train: {{duration: 1ba, global_batch_size: 4, eval_interval: 0ba}}
loggers: {{console: false}}
""")
    build_trainer(load_training_job(yaml)).close()
    assert looks == {trained_folder.name: 1}
