"""Checkpoints that other projects wrote with Composer: recognise them, and explain how to convert them.

They are recognised by the names of their tensors. The names are read as text from the pickle that describes the
checkpoint: nothing is unpickled.
"""

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from llmprune.checkpoints.checkpoint_folder import LATEST, METADATA

_MOST = 2**24  # bytes that are read: the descriptions of very large models have some megabytes
_PICKLES = 5  # number of pickles in a file of PyTorch's older format; the fourth describes the tensors
_SHEARED = re.compile(r"(^|\.)transformer\.blocks\.\d+\.attn\.w[qkv]\.")
_MASKS = re.compile(r"(^|\.)l0_module\.")
_FOUNDRY = re.compile(r"llmfoundry|^HuggingFaceCheckpointer$|(^|\.)transformer\.blocks\.\d+\.(attn\.Wqkv|norm_1)\.")


def checkpoint_in(folder: Path) -> Path | None:
    """A checkpoint in a folder that llmprune did not write; the one with the name of the latest, if there is one."""
    found = [folder / LATEST, *sorted(folder.glob("*.pt")), *(path.parent for path in folder.glob(f"*/{METADATA}"))]
    return next((path for path in found if path.exists()), None)


def what_it_is(path: Path) -> str:
    """Text for the user: which program wrote a checkpoint without llmprune's manifest, and how to convert it.

    Args:
        path: path of a checkpoint file, or of the folder of a sharded checkpoint.
    """
    names = set(_names(path))
    then = "then use that folder with `llmprune score`, `apply` and train.py"
    if any(map(_SHEARED.search, names)) or any(map(_MASKS.search, names)):
        masks = "prune_and_save_model of its post_pruning_processing, then " if any(map(_MASKS.search, names)) else ""
        return (
            f"{path} is a checkpoint of Sheared-LLaMA's own code: make a Hugging Face folder of it with that project's "
            f"scripts ({masks}save_composer_to_hf of its composer_to_hf), {then}"
        )
    if any(map(_FOUNDRY.search, names)):
        return (
            f"{path} is a checkpoint of llm-foundry: make a Hugging Face folder of it with that project's "
            f"scripts/inference/convert_composer_to_hf.py, {then}"
        )
    if {"state", "model"} <= names or any(name.startswith("state.model.") for name in names):
        return (
            f"{path} is a Composer checkpoint, but has no manifest.json of llmprune's beside it: if another program "
            f"wrote it, make a Hugging Face folder of it with that program, {then}; if llmprune did, put manifest.json "
            "and model/ of its folder beside it"
        )
    return f"{path.parent} has no manifest.json: it holds no checkpoints of llmprune"


def _names(path: Path) -> Iterator[str]:
    """All strings in the pickle that describes a checkpoint; the names of its tensors are among them."""
    with suppress(OSError, ValueError, StopIteration, zipfile.BadZipFile, NotImplementedError):
        pickles = io.BytesIO(_description(path))
        for _ in range(_PICKLES):
            for _, argument, _ in pickletools.genops(pickles):
                if isinstance(argument, str):
                    yield argument


def _description(path: Path) -> bytes:
    if path.is_dir():
        with (path / METADATA).open("rb") as file:
            return file.read(_MOST)
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return file.read(_MOST)
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(name) as entry:
            return entry.read(_MOST)
