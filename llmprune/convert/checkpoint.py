"""A checkpoint of llmprune: Composer's state, and the manifest that says what it is."""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig

from llmprune.callbacks.l0_pruning import load_gates
from llmprune.checkpoint_folder import METADATA, CheckpointFolder
from llmprune.checksums import VERIFICATION
from llmprune.convert.foreign import checkpoint_in, what_it_is
from llmprune.convert.stored_state import StoredState, open_state
from llmprune.errors import UserError
from llmprune.families import Family, family_of
from llmprune.gates.gate_set import GateSet
from llmprune.gates.settings import L0PruningConfig, make_goal
from llmprune.models.loading import fingerprint, load_config
from llmprune.recovery.lora import AdaptedWeights, LoRAConfig
from llmprune.run_folder import Manifest

_PREFIX = "model."


class CheckpointWeights(Mapping[str, Tensor]):
    """The model's weights in a Composer checkpoint under their Hugging Face names, read from disk as they are used."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        """Wrap a model's state dict, each of whose tensors is read when it is asked for."""
        self._state = state

    def __getitem__(self, name: str) -> Tensor:
        """One tensor."""
        return self._state[_PREFIX + name]

    def __iter__(self) -> Iterator[str]:
        """The Hugging Face names."""
        return (name.removeprefix(_PREFIX) for name in self._state if name.startswith(_PREFIX))

    def __len__(self) -> int:
        """How many tensors there are."""
        return sum(1 for _ in self)


@dataclass(frozen=True)
class Checkpoint:
    """A Composer checkpoint of llmprune.

    Attributes:
        path: the checkpoint's file, or its folder if it is sharded.
        manifest: what it is.
        config: the config of the model in it.
    """

    path: Path
    manifest: Manifest
    config: PretrainedConfig

    @classmethod
    def open(cls, path: Path | str) -> "Checkpoint":
        """Find a checkpoint by its file, its folder or its run's folder (the newest complete one).

        Raises:
            UserError: there is none.
        """
        path = Path(path)
        if path.is_dir() and not _is_sharded(path):
            folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
            _refuse_foreign(folder, checkpoint_in(folder))
            latest = CheckpointFolder(folder).latest(contents=VERIFICATION.asked)
            if latest is None:
                if (path / "config.json").is_file():
                    raise UserError(f"{path} is a Hugging Face model, not a checkpoint: it needs no conversion")
                raise UserError(f"{path} holds no checkpoint")
            path = latest
        else:
            if not path.exists():
                raise UserError(f"{path} does not exist")
            path = path.resolve()
            _refuse_foreign(path.parent, path)
            CheckpointFolder(path.parent).check(path, contents=VERIFICATION.asked)
        path = path.resolve()
        return cls(path, Manifest.load(path.parent), load_config(path.parent / "model"))

    @property
    def batch(self) -> int:
        """How many batches had been trained on."""
        number = re.match(r"ba(\d+)", self.path.name)
        return int(number[1]) if number else sys.maxsize

    @property
    def model_folder(self) -> Path:
        """Config, tokenizer and generation config of the model."""
        return self.path.parent / "model"

    @property
    def family(self) -> Family:
        """The model's family."""
        return family_of(self.config)

    @cached_property
    def _state(self) -> StoredState:
        return open_state(self.path)

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The model's weights by Hugging Face name, adapters merged into them.

        Raises:
            UserError: the checkpoint is damaged.
        """
        stored = CheckpointWeights(self.state)
        lora = self.manifest.lora
        return stored if lora is None else AdaptedWeights(stored, LoRAConfig(**lora))

    @property
    def state(self) -> Mapping[str, Tensor]:
        """All tensors of Composer's model, under its own names."""
        return self._state.tensors("model")

    def gates(self) -> GateSet | None:
        """The gates that were trained, if any."""
        settings = self.manifest.l0_pruning
        if settings is None:
            return None
        source = self.family.shape(self.config)
        gates = GateSet(source, make_goal(self.config, L0PruningConfig.from_dict(settings)))
        load_gates(gates, self._state.tensors("callbacks", "L0Pruning", "gates"))
        return gates

    def fingerprint(self) -> str:
        """SHA-256 over the model's parameters."""
        return fingerprint(self.weights, self.config)


def is_checkpoint(path: Path | str) -> bool:
    """Whether ``path`` names a Composer checkpoint rather than a Hugging Face model."""
    path = Path(path)
    return path.suffix == ".pt" or (path.is_dir() and not (path / "config.json").is_file())


def _refuse_foreign(folder: Path, checkpoint: Path | None) -> None:
    """Raise ``UserError`` if a checkpoint lies in a folder that is none of llmprune's."""
    if checkpoint is not None and not (folder / "manifest.json").is_file():
        raise UserError(what_it_is(checkpoint))


def _is_sharded(path: Path) -> bool:
    return (path / METADATA).is_file()
