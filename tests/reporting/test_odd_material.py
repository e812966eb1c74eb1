"""Whatever stands in what is reported on: the page is written with what can be shown, or one line says why not."""

import copy
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from llmprune.reporting.page import write_report
from llmprune.utils.errors import UserError
from tests.faults.test_fuzz import damaged_values

LATENCY = {"mean": 0.5, "std": 0.1}
PREFILL = {"batch": 1, "prompt_tokens": 8, "latency_s": LATENCY, "tokens_per_s": 9.5, "peak_memory_bytes": 10**6}
GENERATION = {**PREFILL, "output_tokens": 4, "speedup": {"p50": 1.5, "p10": 1.4, "p90": 1.6}}
KINDS: dict[str, Any] = {
    "results": {
        "schema": 1,
        "models": {
            "a/base": {
                "parameters": 2000000,
                "perplexity": {"text": {"bos_none": 10.0}},
                "tasks": {"arc": {"acc": 0.5}},
            },
            "a/cut": {"parameters": 1000000, "perplexity": {"text": {"bos_none": 12.0}}},
        },
        "generated": {"g": {"continuations": {"g": {"bleu": 12.5}}}},
        "command": "llmprune evaluate a/base a/cut",
    },
    "speed": {
        "schema": 1,
        "device": "cpu",
        "dtype": "float32",
        "models": {name: {"prefill": [PREFILL], "generation": [GENERATION]} for name in ("a/base", "a/cut")},
    },
    "scores": {
        "schema": 1,
        "num_blocks": 2,
        "model": "m",
        "family": "llama",
        "fingerprint": "abc",
        "source": {"layers": 2, "hidden": 4, "heads": 2, "kv_heads": 2, "head_dim": 2, "intermediate": 6},
        "data": {},
        "settings": {},
        "perplexity": None,
        "blocks": {"taylor": [1.0, 2.0]},
        "subblocks": {"mlp": [1.0, 2.0]},
        "spans": {"cosine": {"1": [0.5, 0.25], "2": [0.5]}},
        "pairs": {"cka": [[1.0, 0.5], [0.5, 1.0]]},
    },
    "metrics": [
        {"batch": n, "time/batch": n, "loss/train/total": 5.0, "metrics/eval/loss/a": 4.0, "mixing/weight/a": 0.5,
         "l0/layer/expected_sparsity": 0.1} for n in range(2)
    ],
    "config": {"train": {"duration": "4ba"}, "model": {"path": "x"}, "l0_pruning": {"target": {"layers": 4}},
               "dynamic_loading": {"update_delay": 1}},
}  # fmt: skip


def material(folder: Path, values: dict[str, Any], name: str = "run") -> Path:
    """A folder with a run, scores, results and speeds, as far as they are given."""
    folder.mkdir()
    for kind in ("results", "speed", "scores"):
        if kind in values:
            (folder / f"{kind}.json").write_text(json.dumps(values[kind]))
    if "config" in values:
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text(json.dumps(values["config"]))
        lines = "".join(json.dumps(line) + "\n" for line in values["metrics"] or [])
        (folder / name / "metrics.jsonl").write_text(lines)
    return folder


def test_what_is_whole_is_shown(tmp_path: Path) -> None:
    page = write_report([material(tmp_path / "m", KINDS)], tmp_path / "r.html").read_text()
    assert "left out" not in page and page.count("<svg") == 9


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_is_shown_or_refused(kind: str, tmp_path: Path) -> None:
    refused = []
    for number in range(8):
        values = copy.deepcopy(
            {k: KINDS[k] for k in (("config", "metrics") if kind in ("config", "metrics") else (kind,))}
        )
        values[kind] = damaged_values(values[kind], random.Random(f"{kind} {number}"))
        try:
            write_report([material(tmp_path / str(number), values)], tmp_path / "r.html")
        except UserError as error:
            refused.append(str(error))
    assert not any("\n" in message for message in refused)


@pytest.mark.parametrize("name", ["$\\frac{$", "\udcff", "\x00<script>", "_a" * 300])
def test_odd_names_are_shown(name: str, tmp_path: Path) -> None:
    values = {kind: KINDS[kind] for kind in ("results", "config", "metrics")}
    values = json.loads(re.sub("base|arc|loss/a", lambda _: json.dumps(name)[1:-1], json.dumps(values)))
    page = write_report([material(tmp_path / "m", values)], tmp_path / "r.html").read_text()
    assert page.count("<svg") > 1 and "<script" not in page


def test_a_run_with_a_long_name(tmp_path: Path) -> None:
    write_report([material(tmp_path / "m", KINDS, "r" * 120)], tmp_path / "r.html", plots=tmp_path / "plots")
    assert len([*(tmp_path / "plots").glob("*.png")]) == 9 == len([*(tmp_path / "plots").glob("*.csv")])


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    odd = copy.deepcopy(KINDS)
    odd["speed"]["models"]["a/base"]["prefill"] = [{"batch": "many"}]
    odd["results"]["models"]["a/cut"]["perplexity"] = ["$$"]
    page = write_report([material(tmp_path / "m", odd)], tmp_path / "r.html").read_text()
    assert "speed.json is left out" in page and "results.json is left out" in page
    assert "run-loss" not in page and "Loss of run" in page and "m: importance by rank" in page
