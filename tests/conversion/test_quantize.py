"""Four bits by GPTQ: what is written is small, loads, and computes nearly the same."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from llmprune.cli import app
from llmprune.conversion.quantize import QuantizeConfig, quantize
from llmprune.data.calibration import calibration_samples
from llmprune.data.calibration_settings import CalibrationConfig
from llmprune.models.loaded import open_model
from llmprune.models.loading import load_model, load_tokenizer
from llmprune.models.placement import Placement
from llmprune.utils.errors import UserError


@pytest.fixture(scope="module")
def quantised(trained_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantised") / "out"
    sizes = ("--samples", "16", "--seq-len", "32", "--group-size", "16")
    app(["quantize", str(trained_folder), "--out", str(out), "--data", str(data), *sizes], standalone_mode=False)
    return out


def rounded(weight: Tensor, group: int) -> Tensor:
    """Every group of a row to the nearest of 16 steps: what GPTQ must beat."""
    parts = weight.view(len(weight), -1, group)
    scale = parts.abs().amax(-1, keepdim=True) / 7.5
    return ((parts / scale).round().clamp(-8, 7) * scale).view_as(weight)


def test_it_computes_nearly_the_same(quantised: Path, trained_folder: Path, data: Path) -> None:
    """Nearer to the whole model than plain rounding, on the text that it was calibrated on."""
    opened = open_model(str(quantised), Placement("float32", device="cpu"))
    tokens = calibration_samples(CalibrationConfig(str(data), 16, 32), opened.tokenizer)
    whole, nearest = load_model(trained_folder), load_model(trained_folder)
    with torch.no_grad():
        for name, parameter in nearest.named_parameters():
            if "proj" in name:
                parameter.copy_(rounded(parameter, 16))
        logits, by_gptq, by_rounding = (model(input_ids=tokens).logits for model in (whole, opened.model, nearest))
    assert (by_gptq - logits).norm() < 0.5 * (by_rounding - logits).norm()
    assert (by_gptq - logits).norm() < 0.1 * logits.norm()
    assert opened.parameters == sum(p.numel() for p in whole.parameters())
    output = opened.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert output.shape == (1, 7)


def test_what_is_written(quantised: Path, trained_folder: Path) -> None:
    config = json.loads((quantised / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert (group["weights"]["num_bits"], group["weights"]["group_size"], group["weights"]["actorder"]) == (
        4,
        16,
        "group",
    )
    stored, before = load_file(quantised / "model.safetensors"), load_file(trained_folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert stored[f"{name}.weight_packed"].numel() * 8 == before[f"{name}.weight"].numel()
    assert torch.equal(stored["model.embed_tokens.weight"], before["model.embed_tokens.weight"].bfloat16())
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert json.loads((quantised / "config.json").read_text())["dtype"] == "bfloat16"
    assert (quantised / "model.safetensors").stat().st_mode & 0o044 == 0o044


def test_it_is_evaluated_and_measured_like_any_other(
    quantised: Path, trained_folder: Path, tmp_path: Path, corpus: Path
) -> None:
    out, speed = tmp_path / "results.json", tmp_path / "speed.json"
    models = [str(trained_folder), str(quantised)]
    text = str(corpus / "numbers/part.jsonl")
    app(["evaluate", *models, "--perplexity", text, "--segment", "32", "--out", str(out)], standalone_mode=False)
    found = [next(iter(m["perplexity"].values()))["bos_none"] for m in json.loads(out.read_text())["models"].values()]
    assert math.log(found[1] / found[0]) < 0.1
    app(
        ["measure", *models, "--output-tokens", "3", "--warmups", "0", "--repeats", "1", "--out", str(speed)],
        standalone_mode=False,
    )
    sizes = [m["weights_bytes"] for m in json.loads(speed.read_text())["models"].values()]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 128}, "groups of 128 do not fit rows of 32, 48, 64 weights: .* such as 16"),
        ({"data": CalibrationConfig(samples=4, length=2048)}, "calibration text"),
        ({"group_size": 0}, "must be positive"),
    ],
)
def test_mistakes(trained_folder: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        quantize(trained_folder, tmp_path / "out", QuantizeConfig(**{"group_size": 16, **changes}))
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_before_weights_are_read(
    trained_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Default groups do not fit this model, and its config says so."""
    shutil.copytree(trained_folder, tmp_path / "model")
    for path in (tmp_path / "model").glob("*.safetensors"):
        path.write_bytes(b"no weights")
    monkeypatch.setattr("llmprune.conversion.quantize.load_any_model", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(UserError, match="groups of 128 do not fit rows of 32, 48, 64 weights"):
        quantize(tmp_path / "model", tmp_path / "out", QuantizeConfig())


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        (torch.float32, None, torch.bfloat16),
        (torch.float16, None, torch.float16),
        (torch.bfloat16, torch.float16, torch.float16),
        (torch.float32, torch.float32, torch.float32),
    ],
)
def test_the_format_of_what_stays(
    trained_folder: Path,
    tmp_path: Path,
    data: Path,
    stored: torch.dtype,
    asked: torch.dtype | None,
    written: torch.dtype,
) -> None:
    source = load_model(trained_folder, dtype=stored)
    source.save_pretrained(tmp_path / "model")
    load_tokenizer(trained_folder).save_pretrained(tmp_path / "model")
    settings = QuantizeConfig(CalibrationConfig(str(data), 2, 16), 16, dtype=asked)
    quantize(tmp_path / "model", tmp_path / "out", settings)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {written}
    assert torch.equal(tensors["model.embed_tokens.weight"], source.get_input_embeddings().weight.to(written))


def test_calibration_data_are_not_replaced(trained_folder: Path, data: Path, tmp_path: Path) -> None:
    mine = tmp_path / "data"
    shutil.copytree(data, mine)
    with pytest.raises(UserError, match="would delete the input"):
        quantize(trained_folder, mine, QuantizeConfig(CalibrationConfig(str(mine), 4, 32), 16), overwrite=True)
    assert (mine / "manifest.json").is_file()


def test_a_model_without_linear_layers(trained_folder: Path, tmp_path: Path, data: Path) -> None:
    AutoModelForCausalLM.from_config(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    load_tokenizer(trained_folder).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="gpt2.* has no linear layers"):
        quantize(tmp_path / "gpt2", tmp_path / "out", QuantizeConfig(CalibrationConfig(str(data), 4, 32), 16))


def test_once_is_enough(quantised: Path, tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError, match="quantised already"):
        quantize(quantised, tmp_path / "out", QuantizeConfig(CalibrationConfig(str(data), 4, 32), 16))
    with pytest.raises(UserError, match="exists already"):
        quantize(quantised, quantised, QuantizeConfig())
