"""A checkpoint of llmprune: Composer's state, and the manifest that describes it."""

import logging
import re
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from llmprune.checkpoints.checkpoint_folder import METADATA, CheckpointFolder, batch_of, is_complete
from llmprune.checkpoints.run_folder import Manifest
from llmprune.config.section_registry import all_sections
from llmprune.conversion.foreign_checkpoints import checkpoint_in, what_it_is
from llmprune.conversion.stored_state import StoredState, open_state
from llmprune.models.families import Family, family_of
from llmprune.models.loading import load_model_config
from llmprune.models.stored_weights import fingerprint
from llmprune.pruning.gates.gate_set import GateSet, load_gates
from llmprune.pruning.gates.settings import L0PruningConfig, make_goal
from llmprune.pruning.gates.shape_record import chosen_shape
from llmprune.utils.checksums import VERIFICATION
from llmprune.utils.errors import UserError

log = logging.getLogger(__name__)

_PREFIX = "model."
ATTEMPTS = 20  # number of attempts to open a checkpoint while a run deletes old ones


class CheckpointWeights(Mapping[str, Tensor]):
    """The model's weights in a Composer checkpoint by Hugging Face name; each is read from disk when it is used."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        """Wrap a model's state dict, which reads each tensor when it is accessed."""
        self._state = state

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor by its Hugging Face name."""
        return self._state[_PREFIX + name]

    def __iter__(self) -> Iterator[str]:
        """The Hugging Face names."""
        return (name.removeprefix(_PREFIX) for name in self._state if name.startswith(_PREFIX))

    def __len__(self) -> int:
        """The number of tensors."""
        return sum(1 for _ in self)


@dataclass(frozen=True)
class Checkpoint:
    """A Composer checkpoint of llmprune.

    Attributes:
        path: path of the checkpoint's file, or of its folder if it is sharded.
        manifest: description of the checkpoint.
        config: Hugging Face config of the model in the checkpoint.
    """

    path: Path
    manifest: Manifest
    config: PretrainedConfig

    @classmethod
    def open(cls, path: Path | str) -> "Checkpoint":
        """Open a checkpoint by its file, its folder or its run folder (the newest complete one).

        Raises:
            UserError: there is no checkpoint.
        """
        path = Path(path)
        with ExitStack() as reading:
            if path.is_dir() and not _is_sharded(path):
                path = _newest(path, reading)
            else:
                if not path.exists():
                    raise UserError(f"{path} does not exist")
                path = path.resolve()
                _refuse_foreign(path.parent, path)
                folder = CheckpointFolder(path.parent)
                reading.enter_context(folder.reading(batch_of(path)))
                folder.check_whole(path, contents=VERIFICATION.asked)
            path = path.resolve()
            log.info("reading the checkpoint %s", path)
            found = cls(path, Manifest.load(path.parent), load_model_config(path.parent / "model"))
            weakref.finalize(found, reading.pop_all().close)
            return found

    @property
    def batch(self) -> int:
        """The number of batches trained before the checkpoint."""
        number = re.match(r"ba(\d+)", self.path.name)
        return int(number[1]) if number else sys.maxsize

    @property
    def model_folder(self) -> Path:
        """The folder with config, tokenizer and generation config of the model."""
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
        """The model's weights by Hugging Face name, with adapters merged into them.

        Raises:
            UserError: the checkpoint is damaged.
        """
        weights: Mapping[str, Tensor] = CheckpointWeights(self.state)
        for section, settings in self.sections:
            weights = section.weights(settings, weights)
        return weights

    @property
    def sections(self) -> list[tuple[Any, Any]]:
        """The section classes of the run, each with its settings."""
        known = ((section, self.manifest.section(section.settings)) for section in all_sections().values())
        return [(section, settings) for section, settings in known if settings is not None]

    @property
    def state(self) -> Mapping[str, Tensor]:
        """All tensors of Composer's model, by Composer's names."""
        return self._state.tensors("model")

    def gates(self) -> GateSet | None:
        """The trained gates; None if the run had none."""
        settings = self.manifest.section(L0PruningConfig)
        if settings is None:
            return None
        source = self.family.shape(self.config)
        gates = GateSet(source, make_goal(self.config, settings))
        load_gates(gates, self._state.tensors("callbacks", "L0Pruning", "gates"))
        gates.chosen = chosen_shape(self.path.parent, self.batch, gates.sizes)
        return gates

    def fingerprint(self) -> str:
        """The SHA-256 of the model's parameters."""
        return fingerprint(self.weights, self.config)


def _newest(place: Path, reading: ExitStack) -> Path:
    """The newest complete checkpoint of a run; the run may write and delete checkpoints at the same time.

    Args:
        place: run folder, or its folder of checkpoints.
        reading: exit stack; until it is closed, the run can't delete the checkpoint.

    Raises:
        UserError: there is no checkpoint.
    """
    folder = CheckpointFolder(place / "checkpoints" if (place / "checkpoints").is_dir() else place)
    _refuse_foreign(folder.path, checkpoint_in(folder.path))
    for _ in range(ATTEMPTS):
        seen = folder.by_age()
        latest = folder.latest(contents=VERIFICATION.asked)
        if latest is not None:
            reading.enter_context(folder.reading(batch_of(latest)))
            if latest.exists() and is_complete(latest):
                return latest
            reading.close()
        elif folder.by_age() == seen:
            break
    if (place / "config.json").is_file():
        raise UserError(f"{place} is a Hugging Face model, not a checkpoint: it needs no conversion")
    raise UserError(f"{place} holds no checkpoint")


def is_checkpoint(path: Path | str) -> bool:
    """Whether ``path`` is a Composer checkpoint rather than a Hugging Face model."""
    path = Path(path)
    return path.suffix == ".pt" or (path.is_dir() and not (path / "config.json").is_file())


def _refuse_foreign(folder: Path, checkpoint: Path | None) -> None:
    """Raise ``UserError`` if a checkpoint is in a folder that llmprune did not write."""
    if checkpoint is not None and not (folder / "manifest.json").is_file():
        raise UserError(what_it_is(checkpoint))


def _is_sharded(path: Path) -> bool:
    return (path / METADATA).is_file()
