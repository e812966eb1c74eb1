"""Model folders and hub names: finding and inspecting models, and reading their configs."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from llmprune.models.families import OWN
from llmprune.models.hub import fetch_model
from llmprune.models.modeling_llmprune import register
from llmprune.utils.checksums import VERIFICATION
from llmprune.utils.errors import UserError, first_line
from llmprune.utils.files import read_json
from llmprune.utils.untrusted import inspect

DEQUANTISE = "dequantise it first: llmprune model --gguf FILE --out FOLDER"
_LARGEST = 2**31  # largest size in a config


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder that was found and inspected; functions with an argument ``model`` take it as well.

    A job finds its model once, with ``find_folder``, and passes this object on, so that nothing is fetched or inspected
    again.

    Attributes:
        name: name of the model, as the user wrote it.
        path: path of the folder on this machine.
    """

    name: str
    path: Path

    def __fspath__(self) -> str:
        """The path of the folder, for functions that take a path."""
        return str(self.path)

    def __str__(self) -> str:
        """The name of the model, for messages."""
        return self.name


Model = str | Path | ModelFolder


def find_folder(model: Model) -> ModelFolder:
    """The folder of a model, found and inspected once.

    Raises:
        UserError: see ``resolve_model``.
    """
    return model if isinstance(model, ModelFolder) else ModelFolder(str(model), resolve_model(model))


def resolve_model(model: Model) -> Path:
    """The local folder of a model: the folder itself, or the downloaded (or cached) snapshot of a hub name.

    Raises:
        UserError: the folder is missing, the hub has no such model, or the model is damaged (see ``Verification``).
    """
    if isinstance(model, ModelFolder):
        return model.path
    folder = Path(model)
    if folder.is_dir():
        if (folder / "checkpoints" / "manifest.json").is_file():
            raise UserError(f"{folder} is a run, not a model: turn its checkpoint into one with `llmprune convert`")
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is no Hugging Face model: it has no config.json")
        return _known(folder)
    if folder.suffix == ".gguf" and folder.is_file():
        raise UserError(f"{folder} is a GGUF file: {DEQUANTISE}")
    if folder.exists() or str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise UserError(f"{model} is no folder with a Hugging Face model")
    return _known(fetch_model(str(model)))


def _known(folder: Path) -> Path:
    """Inspect ``folder``, compare its checksums if requested, and register llmprune's own model types."""
    inspect(folder)
    VERIFICATION.look(folder)
    config = folder / "config.json"
    fields = read_json(config) if config.is_file() else {}
    if not isinstance(fields, dict):
        raise UserError(f"{config} holds no fields of a model")
    model_type = str(fields.get("model_type"))
    if model_type.startswith(OWN):
        register(model_type)
    return folder


def has_replacement(model: Model) -> bool:
    """Whether a folder contains a model with a replacement module in the place of blocks."""
    config = Path(model) / "config.json"
    return config.is_file() and read_json(config).get("llmprune_replacement") is not None


def read_config(model: Model) -> PretrainedConfig:
    """The config of a model of any architecture in Transformers.

    Code in the folder is never run, and references to it are removed from the config.

    Raises:
        UserError: the config can't be read.
    """
    folder = resolve_model(model)
    fields = read_json(folder / "config.json")
    try:
        if any(type(value) is int and value > _LARGEST for value in fields.values()):
            raise ValueError("a number is too large")  # some configs create lists of this length
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a config can raise any kind of error
        model_type = fields.get("model_type", "unknown") if isinstance(fields, dict) else "unknown"
        reason = first_line(error)
        raise UserError(f"{folder}/config.json (model type '{model_type}') can't be used: {reason}") from None
    if hasattr(config, "auto_map") and not str(config.model_type).startswith(OWN):
        del config.auto_map
    return config


def longest_input(config: PretrainedConfig) -> int | None:
    """The largest number of tokens that a model with this config takes; None = the config has no limit."""
    return getattr(config, "max_position_embeddings", None)
