"""What a run prints: one line for every interval, one for every evaluation."""

import json
import re
import warnings
from pathlib import Path

import pytest

from llmprune.callbacks.console_lines import _losses, _rates
from llmprune.config.job_files import load_training_job
from llmprune.training.trainer import build_trainer


def lines(
    model: Path,
    data: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    *overrides: str,
    eval_first: bool = False,
) -> list[str]:
    yaml = tmp_path / "job.yaml"
    yaml.write_text(f"""
job: prune
run: {{name: test, folder: {tmp_path}/run, overwrite: true}}
model: {{path: {model}}}
data: {{path: {data}, eval_samples_per_domain: 2}}
l0_pruning: {{target: {{layers: 3, hidden: 24}}}}
optimizer: {{lr: 1.0e-5}}
train: {{duration: 6ba, global_batch_size: 4, microbatch_size: 4, eval_interval: 3ba}}
loggers: {{console_interval: 2ba}}
""")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*warmup duration is 0")
        trainer = build_trainer(load_training_job(yaml, overrides))
        if eval_first:
            trainer.eval()
        trainer.fit()
    trainer.close()
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("batch ")]


def test_a_line_for_every_interval(
    model_folder: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = lines(model_folder, data, tmp_path, capfd)
    places = [re.match(r"batch (\d/6)( \(\d+ %\))?", line) for line in found]
    assert [place and place[0] for place in places] == [
        "batch 2/6 (33 %)", "batch 3/6", "batch 4/6 (67 %)", "batch 6/6 (100 %)", "batch 6/6",
    ]  # fmt: skip
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = {line["batch"]: line for line in metrics if "loss/train/total" in line}
    assert f"  loss {trained[3]['loss/train/total']:.4f}  lr {5.5e-06:.2e}" in found[2]
    hidden = trained[3]["l0/hidden/expected_sparsity"]
    assert f"  sparsity hidden {hidden:.3f} of 0.250, layer " in found[2] and " left  " in found[2]
    assert " left" not in found[3]
    held_out = next(line for line in metrics if line["batch"] == 3 and "metrics/eval/loss" in line)
    assert found[1].startswith(f"batch 3/6  held-out loss {held_out['metrics/eval/loss']:.4f} (letters ")
    assert f"numbers {held_out['metrics/eval/loss/numbers']:.4f}), perplexity" in found[1]


@pytest.mark.parametrize(
    ("interval", "batches"), [("0.5dur", ["3/6", "6/6"]), ("300tok", ["3/6", "5/6", "6/6"]), ("100ba", ["6/6"])]
)
def test_intervals_of_other_units(
    interval: str, batches: list[str], model_folder: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = lines(
        model_folder, data, tmp_path, capfd, f"loggers.console_interval={interval}", "train.eval_interval=0ba"
    )
    assert [line.split(" ")[1] for line in found] == batches


def test_an_evaluation_before_training_is_told_and_takes_no_part_in_the_time_left(
    model_folder: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = lines(model_folder, data, tmp_path, capfd, eval_first=True)
    assert found[0].startswith("batch 0/6  held-out loss ")
    assert " left" in found[1] and " h " not in found[1]


def test_small_losses_keep_their_digits() -> None:
    metrics = {
        "loss/train/total": 3.21404,
        "loss/train/mse": 1.2345e-05,
        "loss/kl": 0.0,
        "lr-DecoupledAdamW/group0": 3e-5,
    }
    assert list(_losses(metrics)) == ["loss 3.2140", "mse 1.23e-05", "kl 0.0000"]
    assert list(_rates(metrics)) == ["lr 3.00e-05"]
