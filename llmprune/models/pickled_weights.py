"""A program: ``pickled_weights.py OUT FILE.bin …`` converts pickled weights to safetensors in the folder OUT.

It runs in a process of its own and imports nothing of llmprune, so that the process that unpickles foreign files has
access to nothing else. Only tensors and plain types are unpickled.
"""

import sys
import zipfile

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

SHARD = "2GB"  # a shard is in memory while it is written


def read(path: str) -> dict[str, Tensor]:
    """The tensors of one file, memory-mapped if the file's format allows it.

    Raises:
        SystemExit: the file contains other objects, or is damaged.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a pickle can raise any kind of error
        reason = str(error).strip().splitlines()
        sys.exit(f"{path} holds more than tensors, or is damaged ({reason[0] if reason else type(error).__name__})")
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        sys.exit(f"{path} holds something else than tensors by name")
    return found


def unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with copies of those that share memory, which safetensors can't store."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


if __name__ == "__main__":
    out, *files = sys.argv[1:]
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= read(file)
    save_torch_state_dict(unshared(weights), out, max_shard_size=SHARD)
