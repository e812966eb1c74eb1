"""Tasks and texts measured during training equal those of the exported model, on one rank and on two that share it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmprune.checkpoints.metrics import read_metrics
from llmprune.config.job_files import load_training_job
from llmprune.conversion.commands import convert
from llmprune.evaluation.evaluate import evaluate
from llmprune.evaluation.live import LiveEvaluation
from llmprune.evaluation.settings import EvaluationConfig, LiveEvaluationConfig, PerplexityConfig, TasksConfig
from llmprune.jobs.train import train
from llmprune.models.loading import load_tokenizer
from llmprune.models.placement import Placement
from llmprune.utils.errors import UserError
from tests.conftest import tiny_config
from tests.evaluation.local_task import make_task

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config(data: Path, trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    make_task(folder / "tasks", questions=13)
    (folder / "text.txt").write_text("3: one two three four five six one two three\n" * 20)
    (folder / "config.yaml").write_text(f"""
run: {{name: test, folder: {folder}/one, seed: 3}}
model: {{path: {trained_folder}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
l0_pruning: {{target: {{layers: 5, intermediate: 40}}, lagrangian_warmup: 2ba, evaluate_at: target}}
optimizer: {{lr: 1.0e-4}}
train: {{duration: 3ba, global_batch_size: 4, microbatch_size: 2, eval_interval: 3ba}}
evaluation: {{tasks: [counting], include_path: {folder}/tasks, texts: [{folder}/text.txt], segment: 32, batch_size: 4}}
loggers: {{console: false}}
""")
    return folder / "config.yaml"


def measured(run: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in read_metrics(run / "metrics.jsonl"):
        names = [name for name in line if name.startswith(("metrics/eval/tasks", "metrics/eval/perplexity/"))]
        found |= {name.removeprefix("metrics/eval/"): line[name] for name in names}
    return found


def test_live_is_exported_on_one_rank_and_on_two(config: Path) -> None:
    folder = config.parent
    train(load_training_job(config))
    live = measured(folder / "one")
    assert {"tasks/counting/acc", "tasks/counting/acc_norm", "perplexity/text"} <= set(live)
    convert(folder / "one", folder / "cut")
    settings = EvaluationConfig(
        [str(folder / "text.txt")],
        PerplexityConfig(32),
        TasksConfig(["counting"], include_path=str(folder / "tasks")),
    )
    found = evaluate([str(folder / "cut")], settings, Placement(device="cpu"))["models"][str(folder / "cut")]
    assert live["perplexity/text"] == pytest.approx(found["perplexity"]["text"]["bos_none"], rel=1e-5)
    assert {metric: live[f"tasks/counting/{metric}"] for metric in ("acc", "acc_norm")} == {
        metric: found["tasks"]["counting"][metric] for metric in ("acc", "acc_norm")
    }
    environment = {name: value for name, value in os.environ.items() if not name.endswith(("RANK", "WORLD_SIZE"))}
    done = subprocess.run(
        [str(Path(sys.executable).parent / "composer"), "-n", "2", "train.py", str(config), f"run.folder={folder}/two",
         "l0_pruning=null", "sharding={}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    train(load_training_job(config, [f"run.folder={folder}/alone", "l0_pruning=null"]))
    # The gradients' norms begin between a half and one: were they summed over the ranks, they would be clipped.
    assert measured(folder / "two") == pytest.approx(measured(folder / "alone"), rel=1e-6)


def test_mistakes(data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(data / "tokenizer")
    for config, message in (
        (LiveEvaluationConfig(), "neither tasks nor texts"),
        (LiveEvaluationConfig(texts=["nowhere.txt"]), "does not exist"),
        (LiveEvaluationConfig(tasks=["arc_eazy"]), "did you mean 'arc_easy'"),
        (LiveEvaluationConfig(texts=["x"], batch_size=0), "batch_size is 0"),
    ):
        with pytest.raises(UserError, match=message):
            LiveEvaluation(config, tiny_config(), tokenizer)
