"""The quickstart in miniature, and every command of the README and the docs on what it leaves."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.harness.forked import carry_out, is_one_command

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
COMMANDS = [
    line.removeprefix(".venv/bin/")
    for block in BLOCKS
    for line in block.splitlines()
    if not line.startswith(("git ", "pip ", "bash scripts/"))
]


@pytest.fixture(scope="module")
def quickstart() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "scripts" / "quickstart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def workplace(quickstart: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout, in which the quickstart has run with tiny budgets."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "train.py").symlink_to(ROOT / "train.py")
    (folder / "README.md").symlink_to(ROOT / "README.md")
    (folder / "yamls").mkdir()
    for yaml in (ROOT / "yamls").glob("*.yaml"):
        text = re.sub(r"duration: \d+ba", "duration: 4ba", yaml.read_text())
        (folder / "yamls" / yaml.name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in (("ROOT", folder), ("MEGABYTES", 1.0), ("VOCABULARY", 600), ("EVAL_SAMPLES_PER_DOMAIN", 2)):
            patch.setattr(quickstart, name, value)
        quickstart.journey(Path("runs/quickstart"), seed=17)
    return folder


def test_the_summary_has_what_it_promises(workplace: Path) -> None:
    summary = json.loads((workplace / "runs/quickstart/summary.json").read_text())
    assert summary["pruned_params"] < summary["base_params"]
    for name in ("base", "pruned", "recovered", "scratch"):
        assert 3 < summary[f"{name}_loss"] < 8
        assert set(summary["domains"][name]) <= {"code", "docstrings", "packages", "reference"}
    assert summary["gated_minus_cut"]["max_rel"] <= 1e-5
    assert set(summary["seconds"]) >= {"corpus", "pretrain", "prune", "continue", "scratch", "evaluate", "measure"}
    results = json.loads((workplace / "runs/quickstart/results.json").read_text())["models"]
    speed = json.loads((workplace / "runs/quickstart/speed.json").read_text())["models"]
    assert [*results] == [*speed] == [f"runs/quickstart/{name}" for name in ("base", "pruned", "recovered")]
    assert "runs/quickstart" in (workplace / "runs/quickstart/report.html").read_text()
    scratch = json.loads((workplace / "runs/quickstart/scratch/config.json").read_text())
    pruned = json.loads((workplace / "runs/quickstart/pruned/config.json").read_text())
    assert all(scratch[key] == pruned[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size"))


def test_a_second_run_reuses_everything(
    quickstart: ModuleType, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    for name, value in (("ROOT", workplace), ("MEGABYTES", 1.0), ("VOCABULARY", 600), ("EVAL_SAMPLES_PER_DOMAIN", 2)):
        monkeypatch.setattr(quickstart, name, value)
    quickstart.show(quickstart.journey(Path("runs/quickstart"), seed=17), Path("runs/quickstart"))
    printed = capsys.readouterr().out
    assert printed.count("reused") == 11 and "same shape and tokens from scratch" in printed


def test_every_command_of_the_pages_works(workplace: Path, tmp_path: Path) -> None:
    assert len(COMMANDS) >= 25
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    log = tmp_path / "log"
    seen: set[str] = set()
    for command in COMMANDS:
        trains = command.startswith("composer") and "score.yaml" not in command
        shortened = f"{command} train.duration=4ba" if trains else command
        if "--correction" in command:
            shortened += " --force"  # the base has hardly been trained: what a correction does to it is chance
        program = command.split()[0]
        if program in seen and is_one_command(shortened):
            code = carry_out(shortened, workplace, log, timeout=300)
        else:  # every program is started by a shell at least once
            with log.open("w") as file:
                done = subprocess.run(
                    ["bash", "-c", shortened], cwd=workplace, env=environment, stdout=file, stderr=file, timeout=300
                )
            code = done.returncode
        seen.add(program)
        assert code == 0, f"{command}\n{log.read_text()[-5000:]}"
