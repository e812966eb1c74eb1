"""Composer checkpoints of other projects are called what they are, and nothing of theirs is unpickled."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from llmprune.conversion.checkpoint import Checkpoint
from llmprune.conversion.commands import convert
from llmprune.conversion.foreign_checkpoints import _MOST
from llmprune.utils.errors import UserError

HF = "then use that folder with `llmprune score`, `apply` and train.py"
SHEARED = ["model.transformer.wte.weight", "model.transformer.blocks.0.attn.wq.weight"]
MASKED = [*SHEARED, "model.l0_module.masks.head.z_loga", "model.l0_module.lambdas.lambda_1_head"]
MPT = ["model.transformer.wte.weight", "model.transformer.blocks.0.attn.Wqkv.weight"]
PLAIN = ["model.model.embed_tokens.weight", "model.model.layers.0.self_attn.q_proj.weight"]


class Payload:
    """What a checkpoint of somebody's may hold; it must not come to life."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["MARK"],)


@pytest.fixture(autouse=True)
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MARK", str(tmp_path / "ran"))
    return tmp_path / "ran"


def state(names: list[str], **more: Any) -> dict[str, Any]:
    weights = {name: torch.zeros(2) for name in names}
    return {"state": {"model": weights, "run_name": "old", **more}, "rng": [Payload()]}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (state(SHEARED), rf"of Sheared-LLaMA's own code: .* \(save_composer_to_hf of its composer_to_hf\), {HF}"),
        (state(MASKED), r"Sheared-LLaMA's own code: .* \(prune_and_save_model of its post_pruning_processing, then "),
        ({name: torch.zeros(2) for name in SHEARED}, "Sheared-LLaMA's own code"),  # what prune_and_save_model writes
        (state(MPT), f"a checkpoint of llm-foundry: .*convert_composer_to_hf.py, {HF}"),
        (state(PLAIN, callbacks={"HuggingFaceCheckpointer": {}}), "a checkpoint of llm-foundry"),
        (state(PLAIN), "a Composer checkpoint, but has no manifest.json .* if llmprune did, put manifest.json"),
        ({"weights": Payload()}, "has no manifest.json: it holds no checkpoints of llmprune"),
    ],
)  # fmt: skip
def test_what_it_is(tmp_path: Path, mark: Path, saved: dict[str, Any], message: str, legacy: bool) -> None:
    (tmp_path / "run").mkdir()
    place = tmp_path / "run" / "ep0-ba3200-rank0.pt"
    torch.save(saved, place, _use_new_zipfile_serialization=not legacy)
    (tmp_path / "run" / "latest-rank0.pt").symlink_to(place.name)
    for named in (place, tmp_path / "run" / "latest-rank0.pt", tmp_path / "run"):
        with pytest.raises(UserError, match=message) as caught:
            convert(named, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_a_sharded_one(tmp_path: Path, mark: Path) -> None:
    folder = tmp_path / "run" / "ep0-ba10"
    folder.mkdir(parents=True)
    (folder / ".metadata").write_bytes(pickle.dumps({f"state.model.{name}": Payload() for name in SHEARED}))
    for named in (folder, folder.parent):
        with pytest.raises(UserError, match="Sheared-LLaMA's own code"):
            Checkpoint.open(named)
    (folder / ".metadata").write_bytes(b"\x80\x04" + b"." * 100 + b"junk" * (_MOST // 4))
    with pytest.raises(UserError, match="it holds no checkpoints of llmprune"):
        Checkpoint.open(folder)
    assert not mark.exists()


def test_a_model_is_no_checkpoint(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a Hugging Face model, not a checkpoint: it needs no conversion"):
        convert(model_folder, tmp_path / "out")
