"""A package of somebody's own adds a criterion and a section, with the text of docs/extending.md."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
JOB = """
run: {{name: noisy, folder: {folder}/run}}
model: {{path: {model}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
train: {{duration: 2ba, global_batch_size: 4, microbatch_size: 4, eval_interval: 0ba}}
weight_noise: {{scale: 0.001}}
loggers: {{console: false}}
"""


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that has the page's package."""
    blocks = dict(re.findall(r"```(python|toml)\n(.*?)```", PAGE, re.DOTALL))
    (tmp_path / "extra.py").write_text(blocks["python"])
    groups = re.findall(r"\[project\.entry-points\.(\w+)\]\n(\w+) = \"(.+)\"", blocks["toml"])
    described = tmp_path / "extra-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("".join(f"[{group}]\n{name} = {at}\n" for group, name, at in groups))
    path = [str(tmp_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def run(installed: dict[str, str], *command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *command], env=installed, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


def test_a_criterion(installed: dict[str, str], model_folder: Path, tmp_path: Path) -> None:
    names = run(installed, "-m", "llmprune.cli", "score", "--names", "x", "--out", "x.json").stdout
    assert re.search(r"^middle +The blocks in the middle go first\.$", names, re.MULTILINE)
    out = tmp_path / "scores.json"
    done = run(installed, "-m", "llmprune.cli", "score", str(model_folder), "--criteria", "middle", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["blocks"]["middle"] == [2, 1, 0, 1]


def test_a_section(installed: dict[str, str], model_folder: Path, data: Path, tmp_path: Path) -> None:
    yaml = tmp_path / "job.yaml"
    yaml.write_text(JOB.format(folder=tmp_path, model=model_folder, data=data))
    done = run(installed, "train.py", str(yaml))
    assert done.returncode == 0, done.stderr
    assert "weight_noise:\n  scale: 0.001" in (tmp_path / "run/config.yaml").read_text()
    manifest = json.loads((tmp_path / "run/checkpoints/manifest.json").read_text())
    assert manifest["sections"] == {"weight_noise": {"scale": 0.001}}
    resumed = run(installed, "train.py", str(yaml), "run.autoresume=true", "weight_noise.scale=0.1")
    assert resumed.returncode == 2 and "weight_noise.scale 0.001; the config asks for 0.1" in resumed.stderr
    mistake = run(installed, "train.py", str(yaml), "weight_noise.scal=1")
    assert mistake.returncode == 2 and "unknown key 'weight_noise.scal'; did you mean 'scale'" in mistake.stderr
    exported = run(installed, "-m", "llmprune.cli", "convert", str(tmp_path / "run"), "--out", str(tmp_path / "model"))
    assert exported.returncode == 0, exported.stderr
    alone = subprocess.run(
        [sys.executable, "-m", "llmprune.cli", "convert", str(tmp_path / "run"), "--out", str(tmp_path / "other")],
        env={**installed, "PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert alone.returncode == 2 and "the section 'weight_noise', which no installed package knows" in alone.stderr
