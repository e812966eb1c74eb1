"""The study of richer heads in miniature: its YAMLs, its report, going on after a stop, what it refuses."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmprune.config.job_files import load_training_job
from llmprune.data.dataset import EvalDataset
from llmprune.data.prepared import PreparedData
from llmprune.jobs.train import train
from llmprune.models.families import RicherHeadsConfig
from llmprune.utils.errors import UserError
from tests.callbacks.fixed_noise import KillAt, Killed
from tests.conftest import SEQUENCE_LENGTH

ROOT = Path(__file__).parents[2]
HEADS = ROOT / "studies" / "heads"


@pytest.fixture(scope="module")
def study() -> ModuleType:
    spec = importlib.util.spec_from_file_location("heads_study", HEADS / "study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["heads_study"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.SIZES["tiny"] = module.Size(
        {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64},
        (*module.SIZES["small"].train, "train.duration=3ba", "train.eval_interval=0ba", "checkpoint.interval=1ba"),
        vocabulary=None,
        length=SEQUENCE_LENGTH,
        eval_samples=4,
        prompts=4,
        output_tokens=6,
        repeats=3,
    )
    return module


@pytest.fixture(scope="module")
def done(study: ModuleType, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that was killed once, with prompts of one's own."""
    out = tmp_path_factory.mktemp("study") / "out"
    prompts = out.parent / "questions.jsonl"
    prompts.write_text(json.dumps({"prompt": "one two three", "reference": "four five six"}) + "\n")
    runs: list[Any] = []

    def killed_second(config: Any) -> Any:
        runs.append(config)
        return train(config, [KillAt(2)] if len(runs) == 2 else [])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmprune.jobs.train.train", killed_second)
        with pytest.raises(Killed):
            study.run("tiny", out, data, prompts)
    study.run("tiny", out, data, prompts)
    return out


def test_the_yamls_are_the_published_study(study: ModuleType) -> None:
    assert sorted(path.stem for path in HEADS.glob("*.yaml")) == sorted([*study.MODELS, "study"])
    for name in study.MODELS:
        kind, _, blocks = name.partition("_")
        job = load_training_job(HEADS / f"{name}.yaml", ["data.path=x"])
        config = job.model.config or {}
        assert (config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]) == (1024, 8, 2752)
        assert config["num_hidden_layers"] == int(blocks) and config["tie_word_embeddings"] is False
        assert job.model.richer_heads == (RicherHeadsConfig() if kind == "richer" else None)
        assert (job.optimizer.name, job.optimizer.lr) == ("adamw", 3e-4)
        assert (job.train.global_batch_size, job.train.duration) == (32, "46000ba") and job.run.seed == 17


def test_figures_are_those_of_the_models(study: ModuleType, done: Path, data: Path) -> None:
    rows = json.loads((done / "results.json").read_text())
    assert list(rows) == study.MODELS
    samples = EvalDataset(PreparedData(data), 4)
    tokens = torch.stack([samples[place]["input_ids"] for place in range(len(samples))])
    for name, row in rows.items():
        model = AutoModelForCausalLM.from_pretrained(done / name / "model", trust_remote_code=True).eval()
        with torch.no_grad():
            loss = model(input_ids=tokens, labels=tokens).loss.item()
        assert row["loss"] == pytest.approx(loss, abs=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert row["parameters"] == sum(p.numel() for p in model.parameters())
        kind, _, blocks = name.partition("_")
        assert model.config.num_hidden_layers == int(blocks) and ("richer" in str(model)) == (kind == "richer")
        assert row["uncached"]["p50"] > 0 and set(row["cached"]) == {"mean", "std", "p5", "p50", "p95"}
        assert set(row["continuations"]) == {
            f"{title}, {manner}" for title in ("held-out text", "questions") for manner in ("greedy", "sampled")
        }
    for blocks in (5, 8):
        extra = rows[f"richer_{blocks}"]["parameters"] - rows[f"plain_{blocks}"]["parameters"]
        assert extra == blocks * (8 * 8 + 8)


def test_a_killed_model_ends_as_the_undisturbed_one(study: ModuleType, done: Path, data: Path, tmp_path: Path) -> None:
    again = study.Study(study.SIZES["tiny"], tmp_path / "out", data, None)
    again.train("richer_5")
    models = [
        AutoModelForCausalLM.from_pretrained(out / "richer_5" / "model", trust_remote_code=True).state_dict()
        for out in (done, tmp_path / "out")
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_the_report(study: ModuleType, done: Path) -> None:
    text = (done / "report.md").read_text()
    assert all(f"| {name} |" in text for name in study.MODELS)
    pictures = sorted(path.name for path in done.glob("*.png"))
    assert len(pictures) == 6 and all(f"({picture})" in text for picture in pictures)


def test_losses_at_equal_cost(study: ModuleType) -> None:
    rows = {
        "plain_5": {"kind": "plain", "parameters": 100, "loss": 4.0},
        "plain_6": {"kind": "plain", "parameters": 200, "loss": 3.0},
        "richer_5": {"kind": "richer", "parameters": 150, "loss": 3.2},
        "richer_6": {"kind": "richer", "parameters": 201, "loss": 3.2},
    }
    assert study.at_equal(rows, "richer_5", "parameters") == pytest.approx(3.5)
    assert study.at_equal(rows, "richer_6", "parameters") is None


def test_mistakes(study: ModuleType, done: Path, data: Path, tmp_path: Path) -> None:
    study.SIZES["other"] = study.Size({}, (), None, SEQUENCE_LENGTH)
    with pytest.raises(UserError, match=r"other settings \(config, .*prompts_file\)"):
        study.run("other", done, data)
    with pytest.raises(UserError, match="name data of 512 tokens"):
        study.run("published", tmp_path / "out")
    with pytest.raises(UserError, match="have 32 tokens"):
        study.run("published", tmp_path / "out", data)
    with pytest.raises(UserError, match="does not exist|can't be read"):
        study.run("tiny", tmp_path / "out", data, tmp_path / "nowhere.jsonl")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="is no study"):
        study.run("tiny", data, data)
