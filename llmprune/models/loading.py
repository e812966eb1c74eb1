"""Opening Hugging Face models and their weights, wherever they lie."""

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.accelerate import init_empty_weights
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmprune.checksums import VERIFICATION
from llmprune.errors import UserError, first_line
from llmprune.families import OWN, Role, family_of
from llmprune.files import read_json
from llmprune.models.hub import fetch_model
from llmprune.models.modeling_llmprune import register

transformers_logging.disable_progress_bar()

_LARGEST = 2**31  # of any size in a config


def resolve_model(model: str | Path) -> Path:
    """The local folder of a model: the folder itself, or the downloaded (or cached) snapshot of a hub name.

    Raises:
        UserError: there is no such folder, no such model can be reached, or it is damaged (see ``Verification``).
    """
    folder = Path(model)
    if folder.is_dir():
        if (folder / "checkpoints" / "manifest.json").is_file():
            raise UserError(f"{folder} is a run, not a model: turn its checkpoint into one with `llmprune convert`")
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is no Hugging Face model: it has no config.json")
        return _known(folder)
    if folder.exists() or str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise UserError(f"{model} is no folder with a Hugging Face model")
    return _known(fetch_model(str(model)))


def _known(folder: Path) -> Path:
    """Compare ``folder`` with its checksums if that was asked for, and let Transformers know llmprune's own types."""
    VERIFICATION.look(folder)
    config = folder / "config.json"
    fields = read_json(config) if config.is_file() else {}
    if not isinstance(fields, dict):
        raise UserError(f"{config} holds no fields of a model")
    model_type = str(fields.get("model_type"))
    if model_type.startswith(OWN):
        register(model_type)
    return folder


def has_stand_in(model: str | Path) -> bool:
    """Whether a folder holds a model in which a network stands in for blocks."""
    config = Path(model) / "config.json"
    return config.is_file() and read_json(config).get("llmprune_stand_in") is not None


def load_config(model: str | Path) -> PretrainedConfig:
    """The config of a model of a supported family.

    Raises:
        UserError: it can't be read, or its architecture is not supported.
    """
    folder = resolve_model(model)
    if has_stand_in(folder):
        raise UserError(
            f"{model} has a stand-in that no config of its family describes: it can be run and measured, but neither "
            "pruned nor trained; do so before the replacement, or replace by blocks"
        )
    fields = read_json(folder / "config.json")
    try:
        if any(type(value) is int and value > _LARGEST for value in fields.values()):
            raise ValueError("a number is too large")  # some configs make lists of such lengths
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # of as many kinds as there are things that a config may hold
        model_type = fields.get("model_type", "unknown") if isinstance(fields, dict) else "unknown"
        reason = first_line(error)
        raise UserError(f"{folder}/config.json (model type '{model_type}') can't be used: {reason}") from None
    family_of(config).shape(config)
    return config


def load_model(
    model: str | Path,
    *,
    dtype: torch.dtype | str = torch.float32,
    attention: str | None = None,
    quantization: QuantizationConfigMixin | None = None,
) -> PreTrainedModel:
    """A causal LM with its weights, in evaluation mode.

    Args:
        model: folder or hub name.
        dtype: of the weights; "auto" = as stored.
        attention: see ``load_any_model``.
        quantization: how its matrices are held; its config does not mention it.

    Raises:
        UserError: it can't be read, or its architecture is not supported.
    """
    config = load_config(model)
    if (resolve_model(model) / "model.safetensors.index.json").is_file() or any(
        resolve_model(model).glob("*.safetensors")
    ):
        parameter_names(StoredWeights(model), config)
    loaded = load_any_model(model, dtype=dtype, attention=attention, quantization=quantization)
    if quantization is not None:
        for name in ("quantization_config", "_pre_quantization_dtype"):
            delattr(loaded.config, name)
    return loaded


def load_any_model(
    model: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    attention: str | None = None,
    device_map: str | None = None,
    adapter: str | Path | None = None,
    quantization: QuantizationConfigMixin | None = None,
) -> PreTrainedModel:
    """A causal LM of any architecture that Transformers knows, quantised ones too, in evaluation mode.

    Args:
        model: folder or hub name.
        dtype: of the weights; "auto" = as stored.
        attention: ``sdpa``, ``eager`` or ``flash_attention_2``; None = sdpa where the architecture has it.
        device_map: how to spread the model over devices (``auto``); None = in this process's main memory.
        adapter: folder of a PEFT adapter to put on the model.
        quantization: how to hold its matrices; None = as stored.

    Raises:
        UserError: it can't be read.
    """
    folder = resolve_model(model)
    packed = {} if quantization is None else {"quantization_config": quantization}  # None would be its own config's
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention,
            device_map=device_map,
            output_loading_info=True,
            **packed,
        )
    except Exception as error:  # of as many kinds as there are things that a config or a file may hold
        raise UserError(f"the model {model} can't be loaded ({type(error).__name__}: {first_line(error)})") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"the weights of {model} lack {len(missing)} tensors that its config asks for: {missing[0]}, …")
    if adapter is not None:
        try:
            loaded.load_adapter(str(adapter))
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"the adapter {adapter} does not fit {model}: {first_line(error)}") from None
    return loaded.eval()


def new_model(config: PretrainedConfig, *, seed: int, attention: str = "sdpa") -> PreTrainedModel:
    """A causal LM with random weights from ``seed``, float32; global random state is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)


def empty_model(model: str | Path, *, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """A causal LM whose parameters have a place in memory but no values yet.

    Memory that is never written is never occupied, so this costs nothing until the model has been sharded and each
    rank fills its part. (Composer can also start from meta tensors, but only on CUDA.)

    Args:
        model: folder or hub name.
        dtype: of the parameters.
        attention: see ``load_any_model``.
    """
    empty = unfilled_model(load_config(model), dtype=dtype, attention=attention)
    with contextlib.suppress(OSError):
        empty.generation_config = GenerationConfig.from_pretrained(resolve_model(model))
    return empty


def unfilled_model(config: PretrainedConfig, *, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """A causal LM of this config whose parameters have a place in memory but no values yet."""
    with init_empty_weights(include_buffers=False):
        empty = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    for module in empty.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, device="cpu")))
    empty.tie_weights()
    return empty


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or from a folder that holds only a tokenizer.

    Raises:
        UserError: there is none.
    """
    folder = Path(model)
    try:
        return AutoTokenizer.from_pretrained(folder if folder.is_dir() else resolve_model(model))
    except (OSError, ValueError, TypeError) as error:
        if folder.is_dir() and not any(folder.glob("tokeniz*")) and not any(folder.glob("*.model")):
            raise UserError(f"{model} has no tokenizer: there are no tokenizer files") from None
        raise UserError(f"{model} has no usable tokenizer: {first_line(error)}") from None


def count_parameters(config: PretrainedConfig) -> int:
    """How many parameters a causal LM of this config has, whatever its weights are packed in."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain)
    return sum(p.numel() for p in model.parameters())


class StoredWeights(Mapping[str, Tensor]):
    """The weights of a model folder, read from its safetensors files one tensor at a time."""

    def __init__(self, model: str | Path) -> None:
        """Open the folder (or the snapshot of a hub name).

        Raises:
            UserError: no safetensors there, or a file is damaged.
        """
        folder = resolve_model(model)
        index = folder / "model.safetensors.index.json"
        try:
            if index.is_file():
                files: dict[str, str] = read_json(index)["weight_map"]
                self._files = {name: folder / Path(file).name for name, file in files.items()}
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

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor. Its file is opened for it alone: a file that stays mapped would stay in memory."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """The shape of one tensor."""
        with safe_open(self._files[name], framework="pt") as file:
            return list(file.get_slice(name).get_shape())

    def size(self) -> int:
        """The bytes of all files."""
        return sum(path.stat().st_size for path in set(self._files.values()))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows ``start`` to ``stop`` of one tensor."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_slice(name)[start:stop]

    def __iter__(self) -> Iterator[str]:
        """The names of all tensors."""
        return iter(self._files)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self._files)


def parameter_names(weights: Mapping[str, Tensor], config: PretrainedConfig) -> list[str]:
    """The sorted names of a model's own parameters: no buffers of older formats, and a tied output layer left out.

    Raises:
        UserError: there are blocks that the config does not have.
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
    """SHA-256 over a model's parameters: names, dtypes, shapes and bytes.

    The same weights give the same hash whether they come from safetensors or from a checkpoint.
    """
    digest = hashlib.sha256()
    for name in parameter_names(weights, config):
        tensor = weights[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
