"""A teacher with more tokens than its student."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from data_prep.reencode import reencode
from llmprune.config.job_files import load_training_job
from llmprune.conversion.commands import apply
from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.jobs.score import score
from llmprune.jobs.train import train
from llmprune.models.loading import load_tokenizer
from llmprune.models.placement import Placement
from llmprune.models.retold import Spelling
from llmprune.plans.plan import Plan
from llmprune.pruning.planning import make_plan
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.pruning.selection.settings import PlanConfig
from llmprune.recovery.token_map import TokenMap
from llmprune.utils.errors import UserError


def test_what_the_student_spells_counts_for_the_first_token_of_the_spelling() -> None:
    # The teacher's tokens: 0 photos, 1 photosynthesis, 2 ynthesis, 3 sun, 4 a row without a token.
    found = TokenMap.spelt(Spelling((0, 2, 3), {1: (0, 2)}), teacher=5)
    assert found.teachers.tolist() == [0, 2, 3] and found.students.tolist() == [0, 0, 1, 2, 3]
    shares = torch.tensor([[0.1, 0.6, 0.05, 0.05, 0.2]])
    for temperature in (1.0, 2.0):
        logits, rest = found.predictions(shares.log() * temperature, temperature)
        assert rest.item() == pytest.approx(0.2)
        expected = torch.tensor([0.7, 0.05, 0.05]) / 0.8
        assert torch.allclose((logits / temperature).softmax(-1), expected, atol=1e-6)


@pytest.mark.parametrize(("student", "teacher"), [(6, 4), (4, 6)])
def test_rows_without_a_token(student: int, teacher: int) -> None:
    found = TokenMap.padded(student, teacher)
    logits = torch.randn(3, teacher, generator=torch.Generator().manual_seed(1))
    made, rest = found.predictions(logits, 1.0)
    assert made.shape == (3, student)
    both = min(student, teacher)
    assert torch.allclose(made.softmax(-1)[:, :both], logits[:, :both].softmax(-1), atol=1e-6)
    assert torch.allclose(rest, logits.softmax(-1)[:, both:].sum(-1), atol=1e-6)
    assert found.teachers[:both].tolist() == list(range(both))


@pytest.fixture(scope="module")
def cut(trained_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that lost twenty tokens, and the data for it."""
    folder = tmp_path_factory.mktemp("cut")
    settings = LayerScoringConfig(CalibrationConfig(str(data), samples=8, length=24), ["block_influence"])
    scores = score(str(trained_folder), settings, Placement("float32", "cpu"))
    plan = make_plan(scores, PlanConfig(shape={"vocabulary": 280}, criterion="block_influence", remove=1))
    apply(trained_folder, plan, folder / "model")
    reencode(data, folder / "model", folder / "data", processes=1)
    return folder


def job(cut: Path, out: Path, teacher: Path, objectives: str = "{kl: 1.0}") -> list[dict[str, float]]:
    """The metrics of a short training with a teacher."""
    path = out.with_suffix(".yaml")
    path.write_text(f"""
run: {{name: test, folder: {out}}}
model: {{path: {cut / "model"}}}
data: {{path: {cut / "data"}, eval_samples_per_domain: 2}}
distillation: {{teacher: {teacher}, objectives: {objectives}, dtype: float32}}
train: {{duration: 12ba, global_batch_size: 8, microbatch_size: 4, eval_interval: 1dur}}
loggers: {{console: false}}
""")
    train(load_training_job(path))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_student_with_fewer_tokens_learns(cut: Path, trained_folder: Path, tmp_path: Path) -> None:
    found = [
        line for line in job(cut, tmp_path / "run", trained_folder, "{kl: 1.0, mse: 0.1}") if "distillation/kl" in line
    ]
    losses = [line["distillation/kl"] for line in found]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    assert all(line["distillation/left_out"] == 0 for line in found)


def test_a_teacher_with_more_rows_than_tokens(cut: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(cut / "model")
    model.resize_token_embeddings(288, mean_resizing=False)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    model.save_pretrained(tmp_path / "teacher")
    load_tokenizer(cut / "model").save_pretrained(tmp_path / "teacher")
    found = [line for line in job(cut, tmp_path / "run", tmp_path / "teacher") if "distillation/kl" in line]
    assert 0 < found[0]["distillation/left_out"] < 0.2
    assert found[0]["distillation/kl"] == pytest.approx(0, abs=1e-4)  # it is the same model


def test_a_teacher_of_another_vocabulary_is_refused(cut: Path, trained_folder: Path, tmp_path: Path) -> None:
    plan = Plan.load(cut / "model" / "llmprune" / "plan.json")
    assert plan.vocabulary is not None
    shutil.copytree(cut / "model", tmp_path / "model", ignore=shutil.ignore_patterns("llmprune", ".llmprune"))
    (tmp_path / "data").symlink_to(cut / "data")
    with pytest.raises(UserError, match="name the plan by which the model's vocabulary was cut"):
        job(tmp_path, tmp_path / "run", trained_folder)
