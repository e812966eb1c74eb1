"""The commands as a user meets them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmprune.cli import app, main
from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.evaluation.settings import GenerationConfig, PerplexityConfig
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.utils.settings import hints_of

ROOT = Path(__file__).parents[2]


def test_verify_prints_json(model_folder: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(model_folder), str(model_folder), "--json"])
    assert json.loads(result.stdout) == {"max_abs": 0.0, "max_rel": 0.0, "mean_abs": 0.0}


def test_families_are_listed() -> None:
    result = CliRunner().invoke(app, ["families", "--json"])
    assert json.loads(result.stdout)["llama"]["model_types"] == ["llama"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "nowhere", "--out", "x"],
        ["apply", "nowhere", "plan.json", "--out", "x"],
        ["verify", "nobody/nothing", "nobody/nothing"],
        ["nosuch"],
        ["measure"],
        ["measure", "model", "--nosuch"],
        ["measure", "model", "--repeats", "many"],
        ["score", "model", "--out", "x.json", "--device", "tpu"],
        ["measure", "model", "--device", "tpu"],
        ["plan", "scores.json", "--correction", "fit"],
        ["plan", "scores.json", "--remove", "many"],
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["llmprune", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_train_py_tells_mistakes_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", tmp_path / "missing.yaml"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"error: {tmp_path / 'missing.yaml'} does not exist"


def test_options_come_from_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    renamed = {"path": "data", "length": "seq-len", "tokens": "perplexity-tokens"}
    for command, cls in (
        ("plan", PlanConfig),
        ("score", LayerScoringConfig),
        ("score", CalibrationConfig),
        ("evaluate", PerplexityConfig),
        ("generate", GenerationConfig),
    ):
        app([command, "--help"], standalone_mode=False)
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        for name in {*hints_of(cls)} - {"data"}:
            assert f"--{renamed.get(name, name).replace('_', '-')} " in shown


def test_the_command_imports_nothing_that_takes_long() -> None:
    """``llmprune download`` tells the hub's library where to keep things before it is imported."""
    slow = ("torch", "transformers", "composer", "huggingface_hub", "lm_eval", "streaming")
    code = f"import sys, llmprune.cli; print([name for name in {slow} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
