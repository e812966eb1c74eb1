"""Quantised models with packed weights, recognised by their config, files or tensors."""

from typing import Any

from llmprune.models.source import DEQUANTISE, ModelFolder
from llmprune.models.stored_weights import StoredWeights
from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json

_PLAIN = {"F64", "F32", "F16", "BF16"}
_FILES = {  # files that quantisation tools write beside the config
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
_PACKED = (  # suffixes of the names of packed tensors
    ".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax", ".SCB", ".quant_map",
)  # fmt: skip


def refuse_quantised(model: ModelFolder) -> None:
    """Raise ``UserError`` for a model with packed weights, which can be run but neither scored, cut nor trained."""
    if (kind := quantised_as(model)) is not None:
        raise UserError(
            f"{model} is quantised ({kind}): prune the model that it was made from; packed weights can be neither "
            "scored, cut nor trained"
        )
    if not any(model.path.glob("*.safetensors")) and (ggufs := sorted(model.path.glob("*.gguf"))):
        raise UserError(f"{model} holds a GGUF file ({ggufs[0].name}) and no safetensors: {DEQUANTISE}")


def refuse_plain_as_quantised(model: ModelFolder) -> None:
    """Raise ``UserError`` for plain weights whose config claims that bitsandbytes packed them."""
    described = _described(read_json(model.path / "config.json"))
    if described is None or _method(described) != "bitsandbytes" or not any(model.path.glob("*.safetensors")):
        return
    if _PLAIN.issuperset(StoredWeights(model).dtypes().values()):
        raise UserError(
            f"{model.path}/config.json says that the weights are quantised by bitsandbytes, but they are plain: delete "
            "quantization_config from it"
        )


def quantised_as(model: ModelFolder) -> str | None:
    """The method by which a model's weights are quantised, as far as it can be recognised; None if they are plain."""
    folder = model.path
    fields = read_json(folder / "config.json")
    if (described := _described(fields)) is not None:
        return _method(described)
    for name, kind in _FILES.items():
        if (folder / name).is_file():
            return f"{kind}, by its {name}"
    if any(folder.glob("*.safetensors")):
        for name, dtype in StoredWeights(model).dtypes().items():
            if name.endswith(_PACKED) or (name.endswith(".weight") and dtype not in _PLAIN):
                return f"'{name}' is stored as {dtype}"
    return None


def _described(fields: Any) -> dict[str, Any] | None:
    """The part of a model's or text model's config that describes packed weights; None if there is none."""
    if not isinstance(fields, dict):
        return None
    for config in (fields, fields.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(config, dict) and isinstance(config.get(key), dict):
                return config[key]
    return None


def _method(described: dict[str, Any]) -> str:
    if "quant_method" not in described and (described.get("load_in_4bit") or described.get("load_in_8bit")):
        return "bitsandbytes"
    return str(described.get("quant_method") or "of an unknown kind")
