"""Many domains: their losses, and that the work grows as their number does."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from composer.loggers import progress_bar_logger

from llmprune.config.job_files import load_training_job
from llmprune.data.format import DataManifest
from llmprune.data.prepared import PreparedData
from llmprune.data.reader import SplitReader
from llmprune.evaluation.losses import evaluate_losses
from llmprune.jobs.train import train
from llmprune.models.causal_lm import MeanLoss
from llmprune.models.loading import load_model

DOMAINS = 40


@pytest.fixture
def many(data: Path, tmp_path: Path) -> Path:
    """Prepared data of many domains, which are two under many names."""
    made = tmp_path / "many"
    shutil.copytree(data / "tokenizer", made / "tokenizer")
    manifest = DataManifest.load(data)
    names = {f"{domain}{number:02}": domain for number in range(DOMAINS // 2) for domain in sorted(manifest.domains)}
    for name, domain in names.items():
        shutil.copytree(data / domain, made / name, copy_function=os.link)
    manifest.domains = {name: manifest.domains[domain] for name, domain in names.items()}
    manifest.save(made)
    return made


def test_the_work_of_a_run_is_linear_in_domains(
    many: Path, data: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.yaml").write_text(f"""
run: {{name: test, folder: {tmp_path}/run}}
model: {{path: {model_folder}}}
data: {{path: {many}, eval_samples_per_domain: 2}}
optimizer: {{lr: 0}}
train: {{duration: 1ba, global_batch_size: 8, microbatch_size: 8, eval_interval: 1ba}}
loggers: {{console: false}}
""")
    done: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        work: Callable[..., Any] = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            done[f"{owner.__name__}.{name}"] += 1
            return work(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    count(SplitReader, "__init__")
    count(MeanLoss, "update")
    count(progress_bar_logger._ProgressBar, "log_data")
    trainer = train(load_training_job(tmp_path / "job.yaml"))
    batches = 2 * DOMAINS // 8
    assert done["SplitReader.__init__"] == 2 * DOMAINS
    assert done["MeanLoss.update"] == 2 * batches  # whatever the number of domains
    assert done["_ProgressBar.log_data"] < 10
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (evaluated,) = (line for line in lines if "metrics/eval/loss" in line)
    alone = evaluate_losses(load_model(model_folder), PreparedData(data), samples_per_domain=2)
    for name in DataManifest.load(many).domains:
        assert evaluated[f"metrics/eval/loss/{name}"] == pytest.approx(alone.domains[name[:-2]], rel=1e-5)
        assert trainer.state.eval_metric_values[f"loss/{name}"] == evaluated[f"metrics/eval/loss/{name}"]
    assert evaluated["metrics/eval/loss"] == pytest.approx(alone.loss, rel=1e-5)
