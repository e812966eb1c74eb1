"""What lies beside a model's weights goes along as it is, whatever Transformers thinks of it."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmprune.config.job_files import load_training_job
from llmprune.conversion.commands import apply, convert, enrich
from llmprune.conversion.export import keep_everything
from llmprune.jobs.train import train
from llmprune.models.families import RicherHeadsConfig
from llmprune.models.loading import load_model_config
from llmprune.models.stored_weights import StoredWeights, fingerprint

UNSAVEABLE: dict[str, dict[str, Any]] = {
    "temperature without sampling": {"temperature": 0.9, "top_p": 0.6},  # as Vicuna v1.5 has it
    "top_k alone": {"top_k": 40},
    "a length penalty with one beam": {"length_penalty": 0.8},
    "a negative padding token": {"pad_token_id": -1},
}


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small model, to be changed."""
    return shutil.copytree(model_folder, tmp_path / "model")


def change(path: Path, **fields: Any) -> None:
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**known, **fields}))


def shortened(model: Path, out: Path) -> Path:
    config = load_model_config(model)
    whole = keep_everything(config, fingerprint(StoredWeights(model), config))
    apply(model, replace(whole, blocks=whole.blocks[:3]), out, overwrite=True)
    return out


@pytest.mark.parametrize("fields", UNSAVEABLE.values(), ids=UNSAVEABLE)
def test_a_generation_config_is_copied(fields: dict[str, Any], model: Path, data: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps(fields))
    before = (model / "generation_config.json").read_bytes()
    assert (shortened(model, tmp_path / "cut") / "generation_config.json").read_bytes() == before
    enrich(model, RicherHeadsConfig(residual=True), tmp_path / "richer")
    assert (tmp_path / "richer" / "generation_config.json").read_bytes() == before
    job = tmp_path / "job.yaml"
    job.write_text(f"""
run: {{name: test, folder: {tmp_path}/run}}
model: {{path: {model}}}
data: {{path: {data}}}
train: {{duration: 1ba, global_batch_size: 2, eval_interval: 0ba}}
""")
    train(load_training_job(job))
    convert(tmp_path / "run", tmp_path / "trained")
    assert (tmp_path / "trained" / "generation_config.json").read_bytes() == before


def test_a_config_with_settings_of_generation(model: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").unlink(missing_ok=True)
    change(model / "config.json", temperature=0.7, pad_token_id=-1)
    cut = shortened(model, tmp_path / "cut")
    assert AutoModelForCausalLM.from_pretrained(cut).config.num_hidden_layers == 3


def test_the_config_names_what_the_folder_is(model: Path, tmp_path: Path) -> None:
    own = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    change(model / "config.json", auto_map=own, architectures=["LlamaForSequenceClassification"])
    cut = shortened(model, tmp_path / "cut")
    config = json.loads((cut / "config.json").read_text())
    assert "auto_map" not in config and config["architectures"] == ["LlamaForCausalLM"]
    assert AutoModelForCausalLM.from_pretrained(cut, trust_remote_code=True).config.num_hidden_layers == 3


def test_the_standard_snippet_works(model: Path, tmp_path: Path) -> None:
    fields = json.loads((model / "tokenizer_config.json").read_text())
    fields.pop("model_input_names", None)
    (model / "tokenizer_config.json").write_text(json.dumps(fields))
    cut = shortened(model, tmp_path / "cut")
    tokenizer, smaller = AutoTokenizer.from_pretrained(cut), AutoModelForCausalLM.from_pretrained(cut)
    assert smaller.generate(**tokenizer("one two", return_tensors="pt"), max_new_tokens=2).shape[1] >= 3
    change(model / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask", "position_ids"])
    names = json.loads((shortened(model, tmp_path / "cut") / "tokenizer_config.json").read_text())["model_input_names"]
    assert names == ["input_ids", "attention_mask", "position_ids"]  # what is said stays


def test_every_companion_goes_along_and_nothing_else(model: Path, tmp_path: Path) -> None:
    files = {
        "chat_template.jinja": "template",
        "additional_chat_templates/tool_use.jinja": "other template",
        "merges.txt": "#version",
        "added_tokens.json": "{}",
        "spiece.model": "pieces",
        "LICENSE": "terms",
    }
    for name, text in files.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(text)
    (model / "tokenizer").mkdir()
    (model / "tokenizer" / "extra.json").write_text("{}")
    os.mkfifo(model / "tokenizer_pipe")
    (model / "modeling_x.py").write_text("code")
    cut = shortened(model, tmp_path / "cut")
    for name, text in files.items():
        assert (cut / name).read_text() == text
    assert not any((cut / name).exists() for name in ("tokenizer", "tokenizer_pipe", "modeling_x.py"))
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(cut)(input_ids=torch.tensor([[1, 2]])).logits.isfinite().all()
