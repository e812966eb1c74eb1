"""Opening models and hashing their weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from llmprune.models.loading import load_model, load_model_config, new_model
from llmprune.models.stored_weights import StoredWeights, fingerprint
from llmprune.utils.errors import UserError
from tests.conftest import random_model, tiny_config


def test_the_fingerprint_is_of_the_weights_however_they_are_stored(tmp_path: Path) -> None:
    for tied in (True, False):
        model = random_model(tiny_config(tie_word_embeddings=tied))
        one, many = tmp_path / f"one{tied}", tmp_path / f"many{tied}"
        model.save_pretrained(one)
        model.save_pretrained(many, max_shard_size="30KB")
        assert len(list(many.glob("*.safetensors"))) > 1
        prints = {fingerprint(StoredWeights(folder), model.config) for folder in (one, many)}
        assert prints == {fingerprint(model.state_dict(), model.config)}


def test_the_fingerprint_sees_one_changed_number() -> None:
    model = random_model(tiny_config())
    before = fingerprint(model.state_dict(), model.config)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] += 1e-3
    assert fingerprint(model.state_dict(), model.config) != before


def test_random_models_depend_on_their_seed_alone() -> None:
    torch.manual_seed(1)
    a = new_model(tiny_config(), seed=3).state_dict()
    state = torch.random.get_rng_state()
    b = new_model(tiny_config(), seed=3).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(state, torch.random.get_rng_state())


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a folder nor reachable"):
        load_model_config("nobody/nothing")
    with pytest.raises(UserError, match="no config.json"):
        load_model_config(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "manifest.json").touch()
    with pytest.raises(UserError, match="is a run, not a model: turn its checkpoint into one with `llmprune convert`"):
        load_model_config(tmp_path / "run")
    GPT2Config(n_layer=1, n_embd=8, n_head=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'gpt2' is not supported; supported: gemma"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        load_model_config(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no safetensors"):
        StoredWeights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"junk" * 10)
    with pytest.raises(UserError, match="damaged"):
        StoredWeights(tmp_path)


def test_weights_that_do_not_fill_the_config_are_refused(model_folder: Path, tmp_path: Path) -> None:
    for field, value, message in (
        ("num_hidden_layers", 6, "lack .* tensors that its config asks for: model.layers.4"),
        ("num_hidden_layers", 3, "model.layers.3.* only 3 blocks"),
        ("intermediate_size", 64, "has the shape .*, but .* by its config.json"),
    ):
        folder = tmp_path / f"{field}{value}"
        shutil.copytree(model_folder, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(UserError, match=message):
            load_model(folder)
