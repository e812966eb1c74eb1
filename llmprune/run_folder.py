"""A run is a folder: resolved config, metrics, gates, checkpoints and the manifest that explains them.

RUN/
  config.yaml        the resolved config
  metrics.jsonl      everything logged
  gates/             gate values at every evaluation (pruning)
  checkpoints/       Composer checkpoints; ``latest-rank0.pt`` points to the newest complete one
    manifest.json    what the checkpoints are: read before anything of theirs is loaded
    model/           Hugging Face config, tokenizer and generation config of the model as it is in the checkpoints
"""

import importlib.metadata
import platform
import re
import subprocess
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.errors import UserError
from llmprune.files import is_leftover, output_folder, read_json, remove, write_json, write_text

RANDOM = "random"  # the source of a model that was not trained before
PACKAGES = ("llmprune", "torch", "mosaicml", "mosaicml-streaming", "transformers", "tokenizers", "numpy")
_NAME = re.compile(r"ba(\d+)(-rank0\.pt)?$")


def _is_complete(checkpoint: Path) -> bool:
    """Whether the part that is written last is there: a folder's metadata, a file's table of contents."""
    return (checkpoint / ".metadata").is_file() or zipfile.is_zipfile(checkpoint)


@dataclass(frozen=True)
class RunFolder:
    """Names of what lies in a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """Everything logged, as JSON lines."""
        return self.path / "metrics.jsonl"

    @property
    def gates(self) -> Path:
        """Gate values at every evaluation."""
        return self.path / "gates"

    @property
    def checkpoints(self) -> Path:
        """Composer checkpoints and their manifest."""
        return self.path / "checkpoints"

    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint, if there is one.

        Composer removes its link to it before it makes the next: after a kill in between, the newest is looked for.
        """
        latest = self.checkpoints / "latest-rank0.pt"
        if latest.exists():
            return latest.resolve()
        return next(filter(_is_complete, self._by_age()), None)

    def _by_age(self) -> list[Path]:
        """All checkpoints, the newest first."""
        found = {int(name[1]): path for path in self.checkpoints.glob("ba*") if (name := _NAME.match(path.name))}
        return [path for _, path in sorted(found.items(), reverse=True)]

    def keep_checkpoints(self, newest: int) -> None:
        """Delete all but the newest complete checkpoints (-1 = none of them), and what a kill left of others.

        Composer counts those of its own process only, so that they would pile up where a run is resumed often.
        """
        complete = [path for path in self._by_age() if _is_complete(path)]
        kept = [self.latest_checkpoint(), *(complete if newest < 0 else complete[:newest])]
        for path in self._by_age():
            if path not in kept and path.resolve() not in kept:
                remove(path)

    def find(self, *, overwrite: bool, autoresume: bool) -> Path | None:
        """See whether the folder may be used; nothing is changed.

        Returns:
            The checkpoint to resume from, if any.

        Raises:
            UserError: a run is there already and neither ``overwrite`` nor ``autoresume`` is set.
        """
        if autoresume and (checkpoint := self.latest_checkpoint()) is not None:
            return checkpoint
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run.folder {self.path} is a file: choose another folder")
        if self.path.exists() and any(not is_leftover(path) for path in self.path.iterdir()):
            if not self.config.exists():
                raise UserError(f"{self.path} holds something that is no run: choose another run.folder")
            if not (overwrite or autoresume):
                raise UserError(
                    f"{self.path} holds a run already: pass run.autoresume=true to go on with it, "
                    "run.overwrite=true to delete it, or another run.folder"
                )
            if autoresume:
                print(f"{self.path} holds no complete checkpoint to resume from: the run begins anew")
        return None

    def create(self) -> None:
        """Make the folder, empty but for what marks it as a run; what stood there is deleted.

        Raises:
            UserError: it can't be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config, "")  # stays throughout: a kill leaves what is still known as a run
            for path in [*self.path.iterdir()]:
                if path != self.config:
                    remove(path)
            self.checkpoints.mkdir()
        except OSError as error:
            raise UserError(f"can't write to {self.path}: {error.strerror}") from None


@dataclass
class Manifest:
    """``manifest.json``: what a folder of checkpoints holds.

    Attributes:
        family: the model's family.
        l0_pruning: the settings of ``L0Pruning``, if gates were trained.
        source: the model that the run started from (folder, hub name, or "random").
        data: the data folder, the hash of its tokenizer and that of its description.
        seed: the run's.
        versions: of Python and the packages that matter.
        git_commit: of llmprune's checkout, if it is one.
        block_replacement: the settings of ``BlockReplacement`` with the span's start and length, if any.
        trainable: the settings of ``PartialTraining``, if any.
        lora: the settings of ``LowRankAdaptation``, if any.
        distillation: the settings of ``Distillation``, if any.
    """

    family: str
    l0_pruning: dict[str, Any] | None
    source: str
    data: dict[str, str]
    seed: int
    versions: dict[str, str]
    git_commit: str | None
    block_replacement: dict[str, Any] | None = None
    trainable: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    distillation: dict[str, Any] | None = None
    schema: int = 1

    def save(self, checkpoints: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the manifest and, beside it, the model's config and tokenizer."""
        with output_folder(checkpoints / "model", overwrite=True) as folder:
            model.config.save_pretrained(folder)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        write_json(checkpoints / "manifest.json", asdict(self))

    @classmethod
    def load(cls, checkpoints: Path) -> "Manifest":
        """Read the manifest of a folder of checkpoints.

        Raises:
            UserError: there is none, or it is damaged.
        """
        path = checkpoints / "manifest.json"
        if not path.is_file():
            raise UserError(f"{checkpoints} has no manifest.json: it holds no checkpoints of llmprune")
        try:
            manifest = cls(**read_json(path))
        except TypeError as error:
            raise UserError(f"{path} is no manifest of this version ({error})") from None
        if manifest.schema != cls.schema:
            raise UserError(f"{path} has schema {manifest.schema}; this version reads {cls.schema}")
        return manifest


def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the checkout that this code runs from; a trailing + marks changes."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
