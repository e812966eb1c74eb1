"""Quantised models are told from plain ones, whatever packed them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmprune.conversion.commands import apply, enrich
from llmprune.conversion.export import keep_everything
from llmprune.jobs.score import score
from llmprune.models.families import RicherHeadsConfig
from llmprune.models.loading import load_any_model, load_model, load_model_config
from llmprune.models.quantised import quantised_as
from llmprune.models.source import find_folder
from llmprune.pruning.scoring.settings import LayerScoringConfig
from llmprune.utils.errors import UserError
from tests.conftest import tiny_config


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small model, to be changed."""
    return shutil.copytree(model_folder, tmp_path / "model")


def said(where: str, **described: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        fields = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**fields, where: described}))

    return change


def file(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_text("{}") and None


def stored(**tensors: torch.Tensor) -> Callable[[Path], None]:
    """Tensors beside or in place of the model's own; ``__`` stands for a dot."""

    def change(model: Path) -> None:
        weights = load_file(model / "model.safetensors")
        named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file({**weights, **named}, model / "model.safetensors", {"format": "pt"})

    return change


Q = "model__layers__0__self_attn__q_proj"
KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "bitsandbytes": (said("quantization_config", quant_method="bitsandbytes", load_in_4bit=True), "bitsandbytes"),
    "old bitsandbytes": (said("quantization_config", load_in_8bit=True), "bitsandbytes"),
    "compressed-tensors": (said("quantization_config", quant_method="compressed-tensors"), "compressed-tensors"),
    "old compressed-tensors": (said("compression_config", quant_method="compressed-tensors"), "compressed-tensors"),
    "GPTQ": (said("quantization_config", quant_method="gptq", bits=4), "gptq"),
    "AWQ": (said("quantization_config", quant_method="awq", bits=4), "awq"),
    "FP8": (said("quantization_config", quant_method="fp8"), "fp8"),
    "MXFP4": (said("quantization_config", quant_method="mxfp4"), "mxfp4"),
    "a text model's": (said("text_config", quantization_config={"quant_method": "hqq"}), "hqq"),
    "AutoGPTQ's own file": (file("quantize_config.json"), "GPTQ"),
    "AutoAWQ's own file": (file("quant_config.json"), "AWQ"),
    "ModelOpt's own file": (file("hf_quant_config.json"), "ModelOpt"),
    "bytes": (stored(**{f"{Q}__weight": torch.zeros(4, 4, dtype=torch.uint8)}), "is stored as U8"),
    "FP8 without a word": (stored(**{f"{Q}__weight": torch.zeros(64, 32).to(torch.float8_e4m3fn)}), "F8_E4M3"),
    "packed words": (stored(**{f"{Q}__qweight": torch.zeros(4, 4, dtype=torch.int32)}), "q_proj.qweight"),
    "scales": (stored(**{f"{Q}__weight_scale": torch.zeros(4)}), "q_proj.weight_scale"),
}


@pytest.mark.parametrize(("change", "kind"), KINDS.values(), ids=KINDS)
def test_every_kind_is_told(change: Callable[[Path], None], kind: str, model: Path) -> None:
    assert quantised_as(find_folder(model)) is None
    change(model)
    assert kind in str(quantised_as(find_folder(model)))
    for use in (load_model_config, load_model):
        with pytest.raises(UserError, match="is quantised .*: prune the model that it was made from") as found:
            use(model)
        assert kind in str(found.value)


def test_it_is_refused_at_once_wherever_it_would_be_pruned(model: Path, tmp_path: Path) -> None:
    plan = keep_everything(tiny_config(), "")
    KINDS["GPTQ"][0](model)
    for use in (
        lambda: score(str(model), LayerScoringConfig(criteria=["magnitude_l1"])),
        lambda: apply(model, plan, tmp_path / "out"),
        lambda: enrich(model, RicherHeadsConfig(residual=True), tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=r"is quantised \(gptq\)"):
            use()
    assert not (tmp_path / "out").exists()


def test_a_gguf_is_to_be_dequantised_first(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model.gguf")
    with pytest.raises(UserError, match=r"holds a GGUF file \(model.gguf\).*: dequantise it first"):
        load_model_config(model)
    with pytest.raises(UserError, match="is a GGUF file: dequantise it first"):
        load_model_config(model / "model.gguf")


def test_plain_weights_that_are_called_packed(model: Path) -> None:
    """Transformers makes meta tensors of them, and fails much later."""
    KINDS["bitsandbytes"][0](model)
    with pytest.raises(UserError, match="but they are plain: delete quantization_config"):
        load_any_model(model)
