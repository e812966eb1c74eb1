"""The small base's journey in miniature: from text to a base, pruned by gates, recovered, beside one from scratch."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def journey() -> ModuleType:
    spec = importlib.util.spec_from_file_location("journey", ROOT / "studies" / "small" / "journey.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def workplace(journey: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout, in which the journey has run with tiny budgets."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "train.py").symlink_to(ROOT / "train.py")
    (folder / "studies" / "small").mkdir(parents=True)
    for yaml in (ROOT / "studies" / "small").glob("*.yaml"):
        text = re.sub(r"duration: \d+ba", "duration: 4ba", yaml.read_text())
        (folder / "studies" / "small" / yaml.name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in (("ROOT", folder), ("MEGABYTES", 1.0), ("VOCABULARY", 600), ("EVAL_SAMPLES_PER_DOMAIN", 2)):
            patch.setattr(journey, name, value)
        journey.journey(Path("runs/small"), seed=17)
    return folder


def test_the_summary_has_what_it_promises(workplace: Path) -> None:
    summary = json.loads((workplace / "runs/small/summary.json").read_text())
    assert summary["pruned_params"] < summary["base_params"]
    for name in ("base", "pruned", "recovered", "scratch"):
        assert 3 < summary[f"{name}_loss"] < 8
        assert set(summary["domains"][name]) <= {"code", "docstrings", "packages", "reference"}
    assert summary["gated_minus_cut"]["max_rel"] <= 1e-5
    assert set(summary["seconds"]) >= {"corpus", "pretrain", "prune", "continue", "scratch", "evaluate", "measure"}
    results = json.loads((workplace / "runs/small/results.json").read_text())["models"]
    speed = json.loads((workplace / "runs/small/speed.json").read_text())["models"]
    assert [*results] == [*speed] == [f"runs/small/{name}" for name in ("base", "pruned", "recovered")]
    assert "runs/small" in (workplace / "runs/small/report.html").read_text()
    scratch = json.loads((workplace / "runs/small/scratch/config.json").read_text())
    pruned = json.loads((workplace / "runs/small/pruned/config.json").read_text())
    assert all(scratch[key] == pruned[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size"))


def test_a_second_run_reuses_everything(
    journey: ModuleType, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    for name, value in (("ROOT", workplace), ("MEGABYTES", 1.0), ("VOCABULARY", 600), ("EVAL_SAMPLES_PER_DOMAIN", 2)):
        monkeypatch.setattr(journey, name, value)
    journey.show(journey.journey(Path("runs/small"), seed=17), Path("runs/small"))
    printed = capsys.readouterr().out
    assert printed.count("reused") == 11 and "same shape and tokens from scratch" in printed
