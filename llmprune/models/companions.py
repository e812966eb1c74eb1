"""A model's files other than its weights: config, tokenizer, generation config."""

import shutil
from pathlib import Path

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from llmprune.models.own_model_types import needs_code
from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json, write_json

GENERATION = "generation_config.json"
# Files of tokenizers.
_TOKENIZERS = (
    "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json", "chat_template*",
    "additional_chat_templates/*.jinja", "*.model", "*.spm", "*.tiktoken", "*.bpe", "*.codes",
)  # fmt: skip
# Files that are copied as they are.
COMPANIONS = (GENERATION, *_TOKENIZERS, "LICENSE*", "NOTICE*")
INPUTS = ["input_ids", "attention_mask"]  # inputs of every family that can be pruned


def save_model_config(config: PretrainedConfig, folder: Path) -> None:
    """Write a model's config.json with the name of its class, without references to code that is not in the folder."""
    if not needs_code(config):
        if hasattr(config, "auto_map"):
            del config.auto_map
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.save_pretrained(folder)


def copy_companions(source: Path, folder: Path, *, tokenizer: bool = True) -> None:
    """Copy a model's companion files, and make its tokenizer return only inputs that the model takes.

    A generation config is copied instead of saved by Transformers: many models have one that Transformers reads but
    refuses to save.

    Args:
        source: folder of the model.
        folder: folder that the files are copied to.
        tokenizer: whether the tokenizer's files are copied.
    """
    for pattern in COMPANIONS if tokenizer else [name for name in COMPANIONS if name not in _TOKENIZERS]:
        for file in sorted(source.glob(pattern)):
            if file.is_file():  # not folders or pipes with such names
                target = folder / file.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copy2(file, target)
    name_inputs(folder)


def name_inputs(folder: Path) -> None:
    """Make a tokenizer without ``model_input_names`` leave out token types, which no decoder takes."""
    place = folder / "tokenizer_config.json"
    if not place.is_file():
        return
    fields = read_json(place)
    if not isinstance(fields, dict):
        raise UserError(f"{place} holds no settings of a tokenizer")
    if "model_input_names" not in fields:
        write_json(place, {**fields, "model_input_names": INPUTS})
