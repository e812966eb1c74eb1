"""A Hugging Face config from its fields."""

from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedTokenizerBase

from llmprune.models.families import by_model_type
from llmprune.utils.errors import UserError, first_line, nearest


def config_from_fields(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """A Hugging Face config from its fields; vocabulary and special tokens come from the tokenizer unless given.

    Raises:
        UserError: the model type is missing or unsupported, a field is unknown, or the values make no model.
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
