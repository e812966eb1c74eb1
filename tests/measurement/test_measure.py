"""Measuring: what is written, what is forced, and what does not fit."""

import csv
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig

from llmprune.cli import app
from llmprune.evaluation.continuations import Prompt, write_continuations
from llmprune.evaluation.settings import GenerationConfig
from llmprune.measurement import measure as module
from llmprune.measurement.measure import MeasureConfig, Setting, _measure_setting, _runner, measure, spread
from llmprune.measurement.monitor import UtilisationWatch, peak_memory
from llmprune.models.loaded import open_model
from llmprune.models.loading import load_tokenizer
from llmprune.models.placement import Placement
from llmprune.utils.errors import UserError

QUICK = ("--warmups", "1", "--repeats", "3")

CPU = Placement(device="cpu")


def test_the_files(model_folder: Path, trained_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    sizes = ("--batch-sizes", "1,3", "--prompt-tokens", "5", "--output-tokens", "4,7", "--out", str(out))
    app(["measure", str(trained_folder), str(model_folder), *sizes, *QUICK], standalone_mode=False)
    results = json.loads(out.read_text())
    six, four = results["models"][str(trained_folder)], results["models"][str(model_folder)]
    assert six["parameters"] - six["parameters_without_embeddings"] == 300 * 32
    assert six["flops_per_token"] == 2 * six["macs_per_token"] > 2 * four["macs_per_token"]
    settings = [(e["batch"], e["prompt_tokens"], e["output_tokens"]) for e in four["generation"]]
    assert settings == [(1, 5, 4), (3, 5, 4), (1, 5, 7), (3, 5, 7)] and len(four["prefill"]) == 2
    for entry in (*four["generation"], *four["prefill"]):
        latency = entry["latency_s"]
        assert 0 < latency["p5"] <= latency["p50"] <= latency["p95"] and latency["std"] >= 0
        tokens = entry["batch"] * entry.get("output_tokens", entry["prompt_tokens"])
        assert entry["tokens_per_s"] == pytest.approx(tokens / latency["mean"])
        assert entry["speedup"]["p10"] <= entry["speedup"]["p50"] <= entry["speedup"]["p90"]
        assert entry["peak_memory_bytes"] >= four["weights_bytes"] and entry["process_peak_bytes"] > 1e8
    assert "speedup" not in six["generation"][0]
    rows = list(csv.DictReader((tmp_path / "speed.csv").open()))
    assert len(rows) == 12 and float(rows[0]["latency_s_mean"]) == six["prefill"][0]["latency_s"]["mean"]


def test_the_length_of_the_output_is_forced(trained_folder: Path) -> None:
    """Every token is the EOS of this model, if it may."""
    opened = open_model(str(trained_folder), Placement(device="cpu"))
    with torch.no_grad():
        opened.model.model.norm.weight.zero_()  # all logits equal: the first token, 0, is the likeliest
    opened.model.generation_config.eos_token_id = 0
    watch = UtilisationWatch(torch.device("cpu"))
    found = _measure_setting([opened], Setting(2, 4, 9), MeasureConfig(warmups=0, repeats=2), watch)
    assert "latency_s" in found[opened.name]


def test_generation_without_a_cache(trained_folder: Path) -> None:
    """Without a cache every step reads all tokens so far."""
    opened = open_model(str(trained_folder), Placement(device="cpu"))
    lengths: list[int] = []
    opened.model.model.embed_tokens.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[1]))
    for cached, wanted in ((True, [4, 1, 1]), (False, [4, 5, 6])):
        lengths.clear()
        module._runner(opened, Setting(2, 4, 3, cached), seed=0)()
        assert lengths == wanted
    found, _ = measure(
        [str(trained_folder)], MeasureConfig(output_tokens=(3,), warmups=0, repeats=2, uncached=True), CPU
    )
    generation = found["models"][str(trained_folder)]["generation"]
    assert [entry.get("cached", True) for entry in generation] == [True, False]


def test_spread_and_ratios() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    found = spread(values)
    assert found["mean"] == 4 and found["std"] == pytest.approx(statistics.stdev(values)) and found["p50"] == 3
    assert module._ratios([2.0, 6.0, 3.0], [1.0, 2.0, 3.0])["p50"] == 2


def test_what_does_not_fit_is_noted_and_the_rest_goes_on(
    trained_folder: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = module._runner

    def small_device(opened: Any, setting: Setting, seed: int) -> Any:
        def run() -> None:
            raise torch.OutOfMemoryError("too much")

        return run if setting.batch == 2 and opened.name == str(trained_folder) else runner(opened, setting, seed)

    monkeypatch.setattr(module, "_runner", small_device)
    config = MeasureConfig(batch_sizes=(1, 2, 3), output_tokens=(), warmups=0, repeats=1)
    results, _ = measure([str(trained_folder), str(model_folder)], config, Placement(device="cpu"), progress=False)
    found = results["models"][str(trained_folder)]["prefill"]
    assert found[1] == {"batch": 2, "prompt_tokens": 16, "out_of_memory": True}
    assert "latency_s" in found[0] and "latency_s" in found[2]
    assert all("latency_s" in entry for entry in results["models"][str(model_folder)]["prefill"])


def test_peak_memory_sees_what_comes_and_goes() -> None:
    with peak_memory(torch.device("cpu")) as peak:
        block = np.ones(50_000_000 // 8)
        time.sleep(0.05)
        del block
    assert 45e6 < peak.added < 80e6 and peak.process > peak.added


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeasureConfig(batch_sizes=(0,)), "batch sizes must be positive"),
        (MeasureConfig(batch_sizes=()), "at least one batch size"),
        (MeasureConfig(repeats=0), "at least 0 and 1"),
        (MeasureConfig(output_tokens=(128,)), "the"),
    ],
)
def test_mistakes(trained_folder: Path, config: MeasureConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure([str(trained_folder)], config, Placement(device="cpu"))


def test_more_mistakes(trained_folder: Path) -> None:
    for arguments, message in (
        ([str(trained_folder), "--batch-sizes", "one"], "whole numbers"),
        ([str(trained_folder)] * 2, "named twice"),
        (["nowhere/at/all"], "no folder"),
    ):
        with pytest.raises(UserError, match=message):
            app(["measure", *arguments], standalone_mode=False)


def test_the_models_own_generation_settings_do_not_count(trained_folder: Path, tmp_path: Path) -> None:
    """Beams and penalties that lie beside the weights would be measured instead of the model."""
    beams = tmp_path / "beams"
    shutil.copytree(trained_folder, beams)
    settings = json.loads((beams / "generation_config.json").read_text())
    (beams / "generation_config.json").write_text(
        json.dumps(settings | {"num_beams": 3, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1})
    )
    prompts = [Prompt("one two"), Prompt("the")]
    outputs = [
        write_continuations(open_model(str(folder), Placement(device="cpu")), prompts, GenerationConfig(12, 0.0))
        for folder in (trained_folder, beams)
    ]
    assert outputs[0] == outputs[1]
    opened = open_model(str(beams), Placement(device="cpu"))
    assert opened.generation(do_sample=False)["generation_config"].num_beams in (None, 1)
    _runner(opened, Setting(1, 4, 3), 17)()


def test_what_else_lies_at_the_output(trained_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "speed.csv").write_text("mine")
    with pytest.raises(UserError, match=r"speed\.csv exists already"):
        app(["measure", str(trained_folder), "--out", str(tmp_path / "speed.json")], standalone_mode=False)
    assert (tmp_path / "speed.csv").read_text() == "mine"


def test_a_model_without_sdpa(tmp_path: Path, trained_folder: Path) -> None:
    """Architectures that Transformers gives no such attention, nor a choice of logits, are measured like any other."""
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=300, hidden_size=16, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path / "bloom")
    load_tokenizer(trained_folder).save_pretrained(tmp_path / "bloom")
    results, _ = measure([str(tmp_path / "bloom")], MeasureConfig(output_tokens=[2], warmups=0, repeats=1), Placement())
    (found,) = results["models"].values()
    assert found["macs_per_token"] is None and len(found["prefill"]) == len(found["generation"]) == 1


def test_prompts_too_large(trained_folder: Path) -> None:
    config = MeasureConfig([10**12, 1], output_tokens=[], warmups=0, repeats=1)
    results, _ = measure([str(trained_folder)], config, Placement(device="cpu"))
    (found,) = results["models"].values()
    assert ["out_of_memory" in entry for entry in found["prefill"]] == [True, False]


def test_a_model_too_large(trained_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from llmprune.models import enough_memory

    monkeypatch.setattr(enough_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(UserError, match="0.0 GB are free: spread it"):
        open_model(str(trained_folder), Placement(device="cpu"))
