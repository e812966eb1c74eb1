"""Models opened for use: where they lie, with an adapter, spread over devices."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from llmprune.cli import app
from llmprune.models.loaded import LoadedModel, ModelSource, open_model
from llmprune.models.loading import load_model
from llmprune.models.number_formats import dtype_for_inference, precision_of, weights_and_products
from llmprune.models.placement import Placement
from llmprune.utils.errors import UserError


@pytest.fixture(scope="module")
def adapter(trained_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that changes something."""
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(load_model(trained_folder), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    return folder


def test_an_adapter(trained_folder: Path, adapter: Path, tokens: torch.Tensor) -> None:
    merged = PeftModel.from_pretrained(load_model(trained_folder), str(adapter)).merge_and_unload()
    opened = open_model(str(trained_folder), Placement(device="cpu", adapter=str(adapter)))
    with torch.no_grad():
        wanted, found = merged(tokens).logits, opened.model(tokens).logits
        plain = load_model(trained_folder)(tokens).logits
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 0.1


def test_a_device_map(trained_folder: Path, tokens: torch.Tensor) -> None:
    opened = open_model(str(trained_folder), Placement(device_map="auto"))
    with torch.no_grad():
        spread = opened.model(tokens.to(opened.model.device)).logits.cpu()
        assert torch.allclose(spread, load_model(trained_folder)(tokens).logits, atol=1e-4)


def test_evaluate_with_an_adapter(trained_folder: Path, adapter: Path, corpus: Path, tmp_path: Path) -> None:
    values = []
    for number, extra in enumerate(([], ["--adapter", str(adapter)])):
        out = tmp_path / f"{number}.json"
        text = [
            "--perplexity",
            str(corpus / "letters/part.jsonl"),
            "--segment",
            "32",
            "--bos",
            "each",
            "--batch-size",
            "auto",
        ]
        app(["evaluate", str(trained_folder), *text, *extra, "--out", str(out)], standalone_mode=False)
        values.append(json.loads(out.read_text())["models"][str(trained_folder)]["perplexity"]["part"]["bos_each"])
    assert values[1] > 1.05 * values[0]


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (Placement(adapter="nowhere"), "holds no adapter"),
        (Placement(dtype="float8"), "dtype 'float8' is unknown"),
        (Placement(device_map="autos"), "valid: auto, balanced, sequential"),
        (Placement(device="cuda"), "device 'cuda' is unknown; valid: cpu, gpu"),
        (Placement(device="gpu"), "device is gpu, but this machine has no GPU"),
    ],
)
def test_mistakes(trained_folder: Path, placement: Placement, message: str) -> None:
    if torch.cuda.is_available() and placement.device == "gpu":
        pytest.skip("there is one")
    with pytest.raises(UserError, match=message):
        open_model(str(trained_folder), placement)


def test_the_second_models_mistakes_show_before_the_first_is_measured(
    trained_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*arguments: object) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(ModelSource, "open", opened)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mute").mkdir()
    (tmp_path / "mute/config.json").write_text((trained_folder / "config.json").read_text())
    (tmp_path / "mute/model.safetensors").write_bytes((trained_folder / "model.safetensors").read_bytes())
    text = str(corpus / "letters/part.jsonl")
    for name, message in (("nowhere", "no folder"), ("empty", "has no config.json"), ("mute", "has no tokenizer")):
        for command in (["evaluate", "--perplexity", text, "--segment", "32"], ["measure"]):
            with pytest.raises(UserError, match=message):
                app([*command, str(trained_folder), str(tmp_path / name)], standalone_mode=False)


def test_results_stay_when_a_later_model_fails(
    trained_folder: Path, model_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_it = ModelSource.open

    def fail(found: ModelSource) -> LoadedModel:
        if found.name == str(model_folder):
            raise UserError("no memory")
        return open_it(found)

    monkeypatch.setattr(ModelSource, "open", fail)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one", "reference": " two"}')
    out = tmp_path / "r.json"
    command = ["evaluate", str(trained_folder), str(model_folder), "--out", str(out), "--max-new-tokens", "2"]
    with pytest.raises(UserError, match="no memory"):
        app([*command, "--prompts", str(prompts)], standalone_mode=False)
    assert list(json.loads(out.read_text())["models"]) == [str(trained_folder)]
    assert len([path for path in (tmp_path / "r.samples").iterdir() if path.is_dir()]) == 1
    monkeypatch.undo()
    text = str(corpus / "letters/part.jsonl")
    app([*command, "--perplexity", text, "--segment", "32", "--overwrite"], standalone_mode=False)
    assert not (tmp_path / "r.samples").exists()  # nothing of the older results stays


@pytest.mark.parametrize(
    ("name", "on_gpu", "processor", "expected"),
    [
        ("auto", True, (), torch.bfloat16),
        ("auto", False, (), torch.float32),
        ("auto", False, ("avx512_bf16",), torch.bfloat16),
        ("auto", False, ("amx_tile",), torch.bfloat16),
        ("bfloat16", False, (), torch.bfloat16),
        ("float32", True, ("amx_tile",), torch.float32),
    ],
)
def test_models_that_do_not_learn_are_in_bfloat16_where_it_is_fast(
    name: str, on_gpu: bool, processor: tuple[str, ...], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    for feature in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{feature}_supported", lambda found=feature in processor: found)
    assert dtype_for_inference(name, on_gpu=on_gpu) is expected
    fast = name == "auto" and expected is torch.bfloat16
    if name == "auto":
        assert weights_and_products(name, on_gpu=on_gpu) == (torch.float32, torch.bfloat16 if fast else None)
        assert precision_of(name, on_gpu=on_gpu) == ("amp_bf16" if fast else "fp32")
    else:
        assert weights_and_products(name, on_gpu=on_gpu) == (expected, None)


def test_a_processor_that_may_not_use_its_bfloat16_instructions_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for limit, expected in (("AVX512_CORE", torch.float32), ("avx512_core_bf16", torch.bfloat16)):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert dtype_for_inference("auto", on_gpu=False) is expected
