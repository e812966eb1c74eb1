"""The stored weights of a model, read one tensor at a time."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from llmprune.models.families import Role, family_of
from llmprune.models.source import Model, resolve_model
from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json


class StoredWeights(Mapping[str, Tensor]):
    """The weights of a model folder, read from its safetensors files one tensor at a time."""

    def __init__(self, model: Model) -> None:
        """Open the folder (or the snapshot of a hub name).

        Raises:
            UserError: the folder has no safetensors, or a file is damaged.
        """
        folder = resolve_model(model)
        index = folder / "model.safetensors.index.json"
        try:
            if index.is_file():
                files: dict[str, str] = read_json(index)["weight_map"]
                self._files = {name: folder / Path(file).name for name, file in files.items()}
                for path in sorted(set(self._files.values())):
                    if not path.is_file():
                        raise UserError(f"{index} names the shard {path.name}, which is missing: use a whole copy")
            else:
                with safe_open(folder / "model.safetensors", framework="pt") as file:
                    self._files = dict.fromkeys(file.keys(), folder / "model.safetensors")
            for path in sorted(set(self._files.values())):
                with safe_open(path, framework="pt"):
                    pass
        except FileNotFoundError:
            raise UserError(
                f"{folder} has no safetensors weights; if it has .bin files, load and save it once with Transformers"
            ) from None
        except SafetensorError as error:
            raise UserError(f"the weights in {folder} are damaged ({error})") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is no index of shards ({type(error).__name__}: {error})") from None

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor and close its file, because a mapped file would stay in memory."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """The shape of one tensor."""
        with safe_open(self._files[name], framework="pt") as file:
            return list(file.get_slice(name).get_shape())

    def dtypes(self) -> dict[str, str]:
        """The dtype of every tensor by name, in safetensors' spelling (``BF16``)."""
        found: dict[str, str] = {}
        for path in sorted(set(self._files.values())):
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        return found

    def size(self) -> int:
        """The size of all files in bytes."""
        return sum(path.stat().st_size for path in set(self._files.values()))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows ``start`` to ``stop - 1`` of one tensor."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_slice(name)[start:stop]

    def __iter__(self) -> Iterator[str]:
        """The names of all tensors."""
        return iter(self._files)

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self._files)


def parameter_names(weights: Mapping[str, Tensor], config: PretrainedConfig) -> list[str]:
    """The sorted names of a model's own parameters, without buffers of old formats and without a tied output layer.

    Raises:
        UserError: the weights have blocks that the config does not have.
    """
    family = family_of(config)
    layers, prefix = family.shape(config).layers, f"{family.blocks}."
    for name in weights:
        number = name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""
        if number.isdecimal() and int(number) >= layers:
            raise UserError(f"the weights hold '{name}', but the config has only {layers} blocks: one of them is wrong")
    output_layer = family.outer_name(Role.OUTPUT) + ".weight" if family.tied(config) else None
    return sorted(
        name
        for name in weights
        if name.endswith((".weight", ".bias")) and name != output_layer and not family.is_buffer(name)
    )


def fingerprint(weights: Mapping[str, Tensor], config: PretrainedConfig) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a model's parameters.

    The same weights have the same hash, whether read from safetensors or from a checkpoint.
    """
    digest = hashlib.sha256()
    for name in parameter_names(weights, config):
        tensor = weights[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
