"""Models that give no numbers are different from all others."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llmprune.cli.common import app
from llmprune.utils.errors import UserError


@pytest.fixture
def broken(model_folder: Path, tmp_path: Path) -> Path:
    """The small model with one weight that is NaN."""
    folder = shutil.copytree(model_folder, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_not_finite_is_different(broken: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for pair in ((broken, model_folder), (model_folder, broken), (broken, broken)):
        names = [str(path) for path in pair]
        assert app(["verify", *names, "--json"], standalone_mode=False) == 1
        assert json.loads(capsys.readouterr().out) == {"max_abs": None, "max_rel": None, "mean_abs": None}
        assert app(["verify", *names], standalone_mode=False) == 1
        assert "different: logits are NaN or infinite" in capsys.readouterr().out
    assert not app(["verify", str(model_folder), str(model_folder), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["max_abs"] == 0


def test_it_is_not_evaluated(broken: Path, corpus: Path) -> None:
    text = str(corpus / "numbers" / "part.jsonl")
    with pytest.raises(UserError, match="not finite: 'model.layers.1.self_attn.v_proj.weight' holds NaN"):
        app(["evaluate", str(broken), "--perplexity", text, "--segment", "16"], standalone_mode=False)
