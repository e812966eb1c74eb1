"""Which files of a hub's repository are fetched, and weights that come as pickles."""

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor

from llmprune.models import pickled_weights
from llmprune.models.hub import fetch_model, wanted_files
from llmprune.models.loading import load_model, load_tokenizer
from llmprune.utils.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ARRIVE = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "source.spm",
    "qwen.tiktoken", "chat_template.jinja", "additional_chat_templates/tools.jinja", "README.md", "LICENSE",
    "LICENSE.txt", "USE_POLICY.md",
]  # fmt: skip
STAY = [
    "modeling_foreign.py", "tokenizer.py", "custom_generate/generate.py", "tf_model.h5", "tf_model.h5.index.json",
    "flax_model.msgpack", "flax_model.msgpack.index.json", "model-q4.gguf", "onnx/model.onnx", "model.onnx",
    "onnx/config.json", "original/params.json", "original/consolidated.00.pth", "original/tokenizer.model",
    "consolidated.safetensors", "consolidated.safetensors.index.json", "consolidated.00.pth", "training_args.bin",
    "model.fp16.safetensors", "additional_chat_templates/evil.py", ".gitattributes", "picture.png",
]  # fmt: skip
PICKLES = ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}


def test_what_arrives_and_what_does_not() -> None:
    read = {"model.safetensors.index.json": INDEX}.__getitem__
    everything = [*ARRIVE, *STAY, *PICKLES]
    assert sorted(wanted_files("a/b", [*everything, "model.safetensors"], read)) == sorted(
        [*ARRIVE, "model.safetensors"]
    )
    sharded = ["model.safetensors.index.json", *SHARDS]
    assert sorted(wanted_files("a/b", [*everything, *sharded], read)) == sorted([*ARRIVE, *sharded])
    assert sorted(wanted_files("a/b", [*ARRIVE, *STAY, "pytorch_model.bin"], read)) == sorted(
        [*ARRIVE, "pytorch_model.bin"]
    )
    assert wanted_files("a/b", ARRIVE, read) == ARRIVE  # a tokenizer alone


@pytest.mark.parametrize(
    ("files", "index", "message"),
    [
        ([*ARRIVE, "model-q4.gguf"], None, "a/b has no model.safetensors and no pytorch_model.bin.* but model-q4"),
        (["model.safetensors.index.json", SHARDS[0]], INDEX, f"a/b lacks {SHARDS[1]}, which its"),
        (["model.safetensors.index.json"], {"weight_map": {"a": "../x.safetensors"}}, "is no name of a file"),
        (["model.safetensors.index.json"], {"weight_map": {"a": "evil.py"}}, "is no index of weights .*evil.py"),
        (["model.safetensors.index.json"], [], "is no index of weights"),
    ],
)  # fmt: skip
def test_what_can_not_be_fetched_is_refused(files: list[str], index: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        wanted_files("a/b", files, lambda _: index)


@pytest.fixture
def snapshot(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in the hub's cache without its weights."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--pickled"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for path in model_folder.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def state(model_folder: Path) -> dict[str, Tensor]:
    """A tied output layer shares its memory with the embeddings, as in most files of this kind."""
    model = load_model(model_folder)
    return {**model.state_dict(), "lm_head.weight": model.get_input_embeddings().weight.data}


@pytest.mark.parametrize(("parts", "legacy"), [(1, False), (3, True)])
def test_pickled_weights_become_safetensors(snapshot: Path, model_folder: Path, parts: int, legacy: bool) -> None:
    tensors = state(model_folder)
    names = [f"pytorch_model-{part}.bin" for part in range(parts)] if parts > 1 else ["pytorch_model.bin"]
    where = {name: names[i % parts] for i, name in enumerate(tensors)}
    for file in names:
        part = {name: tensor for name, tensor in tensors.items() if where[name] == file}
        torch.save(part, snapshot / file, _use_new_zipfile_serialization=not legacy)
    if parts > 1:
        (snapshot / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    loaded, wanted = load_model("org/pickled"), load_model(model_folder)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert load_tokenizer("org/pickled").get_vocab() == load_tokenizer(model_folder).get_vocab()
    folder = fetch_model("org/pickled")
    assert folder == snapshot.parents[1] / "llmprune" / COMMIT
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.glob("*.safetensors"))
    assert not list(folder.rglob("*.bin")) and not list(folder.parent.glob(".*"))


class Payload:
    """What a pickle of somebody's may hold."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_nothing_else_is_unpickled(snapshot: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1), "b": Payload(tmp_path / "ran")}, snapshot / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"the .bin weights of org/pickled can't be .*: .*holds more than tensors"):
        load_model("org/pickled")
    torch.save([torch.zeros(1)], snapshot / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="something else than tensors by name"):
        pickled_weights.read(str(snapshot / "pytorch_model.bin"))
    assert not (tmp_path / "ran").exists() and not (snapshot.parents[1] / "llmprune" / COMMIT).exists()


def test_a_pointer_is_called_one(snapshot: Path) -> None:
    (snapshot / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UserError, match=r"model.safetensors is a Git LFS pointer"):
        load_model("org/pickled")


def test_a_shard_that_is_not_in_the_cache(snapshot: Path) -> None:
    (snapshot / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-1.bin"}}')
    with pytest.raises(UserError, match=r"pytorch_model-1.bin is missing: fetch org/pickled again"):
        load_model("org/pickled")
