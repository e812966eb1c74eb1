"""Sharded checkpoints from anybody: read, or refused in one line, by ``convert`` and before Composer reads them."""

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from llmprune.checkpoints.checkpoint_folder import METADATA
from llmprune.conversion.stored_state import open_state, safe_unpickling
from llmprune.utils.errors import UserError

WEIGHT = torch.arange(12.0).reshape(3, 4)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "ba1"
    state = {"state.model.a": WEIGHT, "state.model.none": torch.zeros(0), "state.model.scalar": torch.tensor(2)}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def a_part(metadata: Any, **changes: Any) -> None:
    index = next(index for index in metadata.storage_data if index.fqn == "state.model.a")
    metadata.storage_data[index] = replace(metadata.storage_data[index], **changes)


def a_tensor(metadata: Any, **changes: Any) -> None:
    entry = metadata.state_dict_metadata["state.model.a"]
    metadata.state_dict_metadata["state.model.a"] = replace(entry, **changes)


def a_chunk(metadata: Any, offsets: Any, sizes: Any) -> None:
    a_tensor(metadata, chunks=[ChunkStorageMetadata(offsets, sizes)])


def test_what_was_saved_is_read(sharded: Path) -> None:
    found = open_state(sharded).tensors("model")
    assert torch.equal(found["a"], WEIGHT) and found["none"].numel() == 0 and found["scalar"] == 2
    with safe_unpickling(sharded):
        pass


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: a_part(m, relative_path="../other/__0_0.distcp"),
        lambda m: a_part(m, relative_path="/etc/passwd"),
        lambda m: a_part(m, relative_path="a\0b"),
        lambda m: a_part(m, relative_path=""),
        lambda m: a_part(m, relative_path=5),
        lambda m: a_part(m, relative_path="__9_0.distcp"),
        lambda m: a_part(m, offset=-1),
        lambda m: a_part(m, offset=10**18),
        lambda m: a_part(m, length=10**18),
        lambda m: a_part(m, length="1"),
        lambda m: a_part(m, length=4),
        lambda m: a_part(m, transform_descriptors=["zstd"]),
        lambda m: a_tensor(m, size=torch.Size([10**9, 10**9])),
        lambda m: a_tensor(m, size=torch.Size([-3, -4])),
        lambda m: a_tensor(m, size="many"),
        lambda m: a_tensor(m, properties=None),
        lambda m: a_tensor(m, chunks=3),
        lambda m: a_chunk(m, torch.Size([0, 0]), torch.Size([10**9, 10**9])),
        lambda m: a_chunk(m, torch.Size([0, 0]), torch.Size([12])),
        lambda m: a_chunk(m, torch.Size([1, 0]), torch.Size([3, 4])),
        lambda m: m.storage_data.clear(),
        lambda m: setattr(m, "storage_data", None),
        lambda m: setattr(m, "state_dict_metadata", [1]),
    ],
)
def test_what_is_not_true_of_the_files_is_refused(sharded: Path, damage: Callable[[Any], None]) -> None:
    metadata = pickle.loads((sharded / METADATA).read_bytes())
    damage(metadata)
    (sharded / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="use another one|not to be trusted") as converting:
        open_state(sharded)
    with pytest.raises(UserError) as resuming, safe_unpickling(sharded):
        raise AssertionError("Composer reads it")
    assert str(resuming.value) == str(converting.value) and "\n" not in str(converting.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x05",
        pickle.dumps([1]),
        pickle.dumps({}),
        b"\x80\x04\x8e" + b"\xff" * 8,
        b"(" * 9 + b"t" * 9,
        b"cos\nsystem\n.",
    ],
)
def test_another_pickle_is_refused(sharded: Path, content: bytes) -> None:
    (sharded / METADATA).write_bytes(content)
    with pytest.raises(UserError, match="no readable checkpoint"):
        open_state(sharded)


def test_a_part_that_can_not_be_loaded_is_told_in_one_line(sharded: Path) -> None:
    failure: Any = CheckpointException(
        "loading", {0: (pickle.UnpicklingError("Weights only load failed\nand more"), [])}
    )  # type: ignore[dict-item]
    with (
        pytest.raises(UserError, match=r"can't be loaded to resume \(Weights only load failed\)"),
        safe_unpickling(sharded),
    ):
        raise failure


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_a_checkpoint_that_vanishes_while_it_is_read_is_told_in_one_line(
    kind: str, sharded: Path, tmp_path: Path
) -> None:
    path = sharded
    if kind == "whole":
        path = tmp_path / "ba1-rank0.pt"
        torch.save({"state": {"model": {"a": torch.zeros(2**19)}}}, path)
    found = open_state(path).tensors("model")
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=f"{path.name} ") as told:
        found["a"]
    assert "\n" not in str(told.value)
