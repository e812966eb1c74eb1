"""Loading of Hugging Face models and their weights, from folders or the hub."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.accelerate import init_empty_weights
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmprune.models.families import by_model_type, family_of
from llmprune.models.finite import first_not_finite
from llmprune.models.quantised import refuse_plain_as_quantised, refuse_quantised
from llmprune.models.source import Model, find_folder, has_replacement, read_config, resolve_model
from llmprune.models.stored_weights import StoredWeights, parameter_names
from llmprune.utils.errors import UserError, first_line, nearest
from llmprune.utils.files import read_json
from llmprune.utils.untrusted import inspect, open_tokenizer

transformers_logging.disable_progress_bar()


def load_model_config(model: Model) -> PretrainedConfig:
    """The config of a model of a supported family, with plain weights.

    Raises:
        UserError: the config can't be read, its architecture is not supported, or the weights are quantised.
    """
    model = find_folder(model)
    if has_replacement(model):
        raise UserError(
            f"{model} has a replacement module that no config of its family describes: it can be run and measured, "
            "but neither pruned nor trained; do so before the replacement, or replace by blocks"
        )
    refuse_quantised(model)
    config = read_config(model)
    family_of(config).shape(config)
    return config


def load_model(
    model: Model,
    *,
    dtype: torch.dtype | str = torch.float32,
    attention: str | None = None,
    quantization: QuantizationConfigMixin | None = None,
    finite: bool = True,
) -> PreTrainedModel:
    """A causal LM of a supported family with its plain weights, in evaluation mode.

    Args:
        model: folder or hub name of the model.
        dtype: dtype of the weights; "auto" = as stored.
        attention: implementation of attention, see ``load_any_model``.
        quantization: quantisation of the matrices in memory; it is not recorded in the model's config; None = none.
        finite: whether weights that are not finite are an error.

    Raises:
        UserError: the model can't be read, is quantised, or its architecture is not supported.
    """
    model = find_folder(model)
    config = load_model_config(model)
    if (model.path / "model.safetensors.index.json").is_file() or any(model.path.glob("*.safetensors")):
        parameter_names(StoredWeights(model), config)
    loaded = load_any_model(model, dtype=dtype, attention=attention, quantization=quantization, finite=finite)
    if quantization is not None:
        for name in ("quantization_config", "_pre_quantization_dtype"):
            delattr(loaded.config, name)
    return loaded


def load_any_model(
    model: Model,
    *,
    dtype: torch.dtype | str = "auto",
    attention: str | None = None,
    device_map: str | None = None,
    adapter: str | Path | None = None,
    quantization: QuantizationConfigMixin | None = None,
    finite: bool = True,
) -> PreTrainedModel:
    """A causal LM of any architecture in Transformers, in evaluation mode; it may be quantised.

    Code in the model's folder is never run.

    Args:
        model: folder or hub name of the model.
        dtype: dtype of the weights; "auto" = as stored.
        attention: implementation of attention: ``sdpa``, ``eager`` or ``flash_attention_2``; None = sdpa if the
            architecture supports it.
        device_map: distribution of the model over devices (``auto``); None = in this process's main memory.
        adapter: folder of a PEFT adapter to add to the model; None = no adapter.
        quantization: quantisation of the matrices in memory; None = as stored.
        finite: whether weights that are not finite are an error.

    Raises:
        UserError: the model can't be read, or its weights are not finite.
    """
    model = find_folder(model)
    folder, config = model.path, read_config(model)
    refuse_plain_as_quantised(model)
    packed = {} if quantization is None else {"quantization_config": quantization}  # None would hide the config's
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            device_map=device_map,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,  # so that nothing is unpickled
            # Given, because Transformers would search for one and run custom_generate/generate.py beside it.
            generation_config=_generation_config(folder, config),
            **packed,
        )
    except Exception as error:  # configs and files can raise any kind of error
        if (misfit := _misfit(model, config)) is not None:
            raise UserError(misfit) from None
        raise UserError(f"the model {model} can't be loaded ({type(error).__name__}: {first_line(error)})") from None
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"the weights of {model} lack {len(missing)} tensors that its config asks for: {missing[0]}, …")
    if adapter is not None:
        _add_adapter(loaded, Path(adapter), model)
    if finite and (name := first_not_finite(loaded.named_parameters())) is not None:
        raise UserError(f"the weights of {model} are not finite: '{name}' holds NaN or infinite numbers")
    return loaded.eval()


def _generation_config(folder: Path, config: PretrainedConfig) -> GenerationConfig:
    """The generation config in a folder; without one, that made from the model's config."""
    try:
        found = GenerationConfig.from_pretrained(folder)
    except OSError:
        found = GenerationConfig.from_model_config(config)
    found._from_model_config = False  # otherwise Transformers compares it with the model's config
    return found


def _add_adapter(loaded: PreTrainedModel, adapter: Path, model: Model) -> None:
    """Add a PEFT adapter to a model; only safetensors are read.

    Raises:
        UserError: the folder has no adapter, or the adapter does not fit the model.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise UserError(f"{adapter} holds no PEFT adapter: it has no adapter_config.json")
    inspect(adapter)
    if not (adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"{adapter} has no adapter_model.safetensors: load the adapter with PEFT and save it once")
    try:
        loaded.load_adapter(str(adapter))
    except Exception as error:  # a config can raise any kind of error
        raise UserError(f"the adapter {adapter} does not fit {model}: {first_line(error)}") from None


def _misfit(model: Model, config: PretrainedConfig) -> str | None:
    """A sentence about the first stored tensor that does not fit the model's config; None = no such tensor."""
    try:
        weights = StoredWeights(model)
    except UserError as error:
        return str(error)
    with contextlib.suppress(Exception):
        with torch.device("meta"):
            wanted = dict(AutoModelForCausalLM.from_config(config).named_parameters())
        for name in sorted({*weights} & {*wanted}):
            found, size = weights.shape(name), list(wanted[name].shape)
            if found != size:
                fields = read_json(resolve_model(model) / "config.json")
                unsaid = [key for key in family_of(config).fields.values() if key not in fields]
                hint = f", which does not say {' and '.join(unsaid)}" if unsaid else ""
                return f"'{name}' in {model} has the shape {found}, but {size} by its config.json{hint}"
    return None


def new_model(config: PretrainedConfig, *, seed: int, attention: str = "sdpa") -> PreTrainedModel:
    """A causal LM with random weights from ``seed``, float32; global random state is not changed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)


def empty_model(model: Model, *, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """A causal LM whose parameters have memory reserved but no values yet.

    Reserved memory that is never written takes no physical memory, so this model costs nothing until it has been
    sharded and each rank fills its part. (Composer can also start from meta tensors, but only on CUDA.)

    Args:
        model: folder or hub name of the model.
        dtype: dtype of the parameters.
        attention: implementation of attention, see ``load_any_model``.
    """
    model = find_folder(model)
    empty = unfilled_model(load_model_config(model), dtype=dtype, attention=attention)
    with contextlib.suppress(OSError):
        empty.generation_config = GenerationConfig.from_pretrained(resolve_model(model))
    if (misfit := _misfit(model, empty.config)) is not None:
        raise UserError(misfit)
    return empty


def unfilled_model(config: PretrainedConfig, *, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """A causal LM with this config whose parameters have memory reserved but no values yet."""
    with init_empty_weights(include_buffers=False):
        empty = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    for module in empty.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, device="cpu")))
    empty.tie_weights()
    return empty


def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or of a folder that contains only a tokenizer.

    Raises:
        UserError: there is no usable tokenizer.
    """
    folder = Path(model)
    try:
        return open_tokenizer(folder if folder.is_dir() else resolve_model(model))
    except (OSError, ValueError, TypeError) as error:
        if folder.is_dir() and not any(folder.glob("tokeniz*")) and not any(folder.glob("*.model")):
            raise UserError(f"{model} has no tokenizer: there are no tokenizer files") from None
        raise UserError(f"{model} has no usable tokenizer: {first_line(error)}") from None


def count_parameters(config: PretrainedConfig) -> int:
    """The number of parameters of a causal LM with this config; for quantised models, that of the unpacked weights."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plain)
    return sum(p.numel() for p in model.parameters())


def config_from_fields(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """A Hugging Face config from its fields; vocabulary size and special tokens come from the tokenizer unless given.

    Raises:
        UserError: the model type is missing or unsupported, a field is unknown, or no model can have the values.
    """
    values = dict(values)
    model_type = values.pop("model_type", None)
    family = by_model_type().get(str(model_type))
    if family is None:
        supported = ", ".join(sorted(by_model_type()))
        raise UserError(f"model.config.model_type '{model_type}' is not supported; supported: {supported}")
    known = {name for name in vars(CONFIG_MAPPING[model_type]()) if not name.startswith("_")} | {
        *family.fields.values()
    }
    for name in values:
        if name not in known:
            raise UserError(f"model.config has the unknown field '{name}'; {nearest(name, known)}")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    try:
        config = CONFIG_MAPPING[model_type](**{"vocab_size": len(tokenizer), **special, **values})
        family.shape(config)
    except (TypeError, ValueError, ZeroDivisionError, UserError) as error:
        raise UserError(f"model.config makes no {model_type} model ({first_line(error)})") from None
    return config
