"""What a config leaves open follows from the model and the data."""

import math
from pathlib import Path

import pytest

from llmprune.config.job_files import load_training_job
from llmprune.config.left_open import LEARNING_RATES, fill_in, learning_rate
from llmprune.training.checks import check


def test_learning_rates_are_those_of_the_table_and_fall_with_the_size() -> None:
    for size, rate in LEARNING_RATES.items():
        assert learning_rate(size) == pytest.approx(rate)
    between = [learning_rate(10 ** (power / 10)) for power in range(60, 125)]
    assert between == sorted(between, reverse=True)
    assert between[0] == max(LEARNING_RATES.values()) and between[-1] == min(LEARNING_RATES.values())
    middle = learning_rate(math.sqrt(1e9 * 7e9))
    assert middle == pytest.approx(math.sqrt(1e-4 * 5e-5), rel=0.02)


@pytest.mark.parametrize(
    ("given", "rate", "batch"),
    [
        ([], 3e-4, 1024),
        (["optimizer.lr=0.5", "train.global_batch_tokens=100"], 0.5, 3),
        (["train.global_batch_size=7"], 3e-4, 7),
        (["train.global_batch_tokens=1"], 3e-4, 1),
    ],
)
def test_what_is_given_stays_and_the_rest_is_filled_in(
    given: list[str], rate: float, batch: int, tmp_path: Path
) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("run: {name: x}\nmodel: {path: here}\ndata: {path: there}\ntrain: {duration: 1ba}\n")
    config = load_training_job(path, given)
    fill_in(config, parameters=1000, length=32)
    assert config.optimizer.lr == rate and config.samples_per_step == batch


def test_adapters_take_larger_steps(tmp_path: Path, trained_folder: Path, data: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        f"run: {{name: x, folder: {tmp_path}/run}}\nmodel: {{path: {trained_folder}}}\ndata: {{path: {data}}}\n"
        "train: {duration: 1ba, global_batch_tokens: 64}\n"
    )
    for given, rate in (([], 3e-4), (["lora={}"], 1.2e-3)):
        config = load_training_job(path, given)
        check(config)
        assert config.optimizer.lr == pytest.approx(rate) and config.train.global_batch_size == 2
