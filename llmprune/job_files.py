"""Jobs as YAML files: reading, writing, describing.

A job is one YAML file, which may name another as its ``base``, and ``key=value`` overrides.
"""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from llmprune.config import Config, IterationConfig, ScoringConfig, SearchConfig
from llmprune.errors import UserError, first_line, nearest
from llmprune.files import write_text

J = TypeVar("J")
# user:password@ in a URL, signed URLs, keys of AWS, tokens of the hub, keys of Weights & Biases
_SECRET = re.compile(
    r"://[^/@]*:[^/@]*@|[?&](X-Amz-Signature|sig|token|api_key|password)=|\b(AKIA|ASIA)[0-9A-Z]{16}\b"
    r"|\bhf_[A-Za-z0-9]{30,}\b|\A[0-9a-f]{40}\Z"
)


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Config | ScoringConfig:
    """Read the YAML of any job and apply overrides.

    One with ``layer_scoring`` scores, one with ``iterate`` prunes in rounds, one with ``search`` searches, all others
    train.

    Raises:
        UserError: see ``load_config``.
    """
    sections = _read(Path(path))
    if "layer_scoring" in sections:
        return _load(path, overrides, ScoringConfig)
    if "iterate" in sections:
        return _load(path, overrides, IterationConfig)
    if "search" in sections:
        return _load(path, overrides, SearchConfig)
    return _load(path, overrides, Config)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML of a job that trains and apply overrides.

    Args:
        path: the YAML file.
        overrides: ``section.key=value``, later ones win; a value in braces replaces the whole mapping.

    Raises:
        UserError: the file can't be read, a key is unknown, a value has the wrong type or is missing.
    """
    return _load(path, overrides, Config)


def _load(path: str | Path, overrides: Sequence[str], schema: type[J]) -> J:
    loaded = _read(Path(path))
    _merge(schema, loaded, str(path))
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator:
            raise UserError(f"'{override}' is not of the form section.key=value")
        try:
            given = OmegaConf.from_dotlist([override])
        except YAMLError:
            raise UserError(f"'{override}' is no valid value: put quotes around the whole ('{key}={{…}}')") from None
        _merge(schema, given, f"'{override}'")
        OmegaConf.update(loaded, key, OmegaConf.select(given, key), merge=False)
    merged = _merge(schema, loaded, str(path))
    try:
        OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise UserError(f"{path}: {error.full_key or 'a key'} must be set") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {first_line(error)}") from None
    assert isinstance(config, schema)
    _refuse_secrets(dataclasses.asdict(config))  # type: ignore[call-overload]
    return config


def _refuse_secrets(values: Any, key: str = "") -> None:
    """Raise ``UserError`` for what looks like a password or a token: config.yaml keeps and shows every value."""
    if isinstance(values, dict | list):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            _refuse_secrets(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, str) and _SECRET.search(values):
        raise UserError(
            f"{key} holds what looks like a password or a token, which everyone who sees the run would see: set it in "
            "the environment (AWS_SECRET_ACCESS_KEY, HF_TOKEN, WANDB_API_KEY, …)"
        )


def _read(path: Path) -> DictConfig:
    """A YAML file, laid over the one that its key ``base`` names (a path beside it)."""
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must hold sections such as run:, model: and data:")
    base = loaded.pop("base", None)
    if base is None:
        return loaded
    merged = OmegaConf.merge(_read(path.parent / base), loaded)
    assert isinstance(merged, DictConfig)
    return merged


def save_config(config: Config | ScoringConfig, path: Path) -> None:
    """Write the resolved config as YAML."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True))


def describe() -> str:
    """Every section and key of every job's YAML with its default and its meaning, as text."""
    lines: list[str] = []
    for schema in (Config, ScoringConfig, IterationConfig, SearchConfig):
        lines += [f"## {inspect.cleandoc(schema.__doc__ or '').splitlines()[0]}"]
        known = (
            {section.name for section in dataclasses.fields(Config)}
            if schema in (IterationConfig, SearchConfig)
            else set()
        )
        for section in dataclasses.fields(schema):
            if section.name in known:
                continue
            cls = _dataclass_in(typing.get_type_hints(schema)[section.name])
            optional = " (optional)" if section.default is None else ""
            lines += ["", f"{section.name}:{optional}  # {inspect.cleandoc(cls.__doc__).splitlines()[0]}"]
            lines += _describe_fields(cls, "  ")
        lines += [""]
    return "\n".join(lines[:-1])


def _describe_fields(cls: Any, indent: str) -> list[str]:
    lines, meanings = [], _attributes(cls)
    for key in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[key.name]
        meaning = f"  # {meanings[key.name]}" if key.name in meanings else ""
        nested = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
        if nested is not None:
            lines += [f"{indent}{key.name}:{meaning}", *_describe_fields(nested, indent + "  ")]
            continue
        default = key.default if key.default_factory is dataclasses.MISSING else key.default_factory()
        shown = "(required)" if default is MISSING else "null" if default is None else str(default)
        lines.append(f"{indent}{key.name}: {shown}{meaning}")
    return lines


def _attributes(cls: Any) -> dict[str, str]:
    """What a dataclass's docstring says of each attribute."""
    _, _, section = inspect.cleandoc(cls.__doc__).partition("Attributes:\n")
    entries = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _merge(schema: Any, update: Any, source: str) -> Any:
    try:
        return OmegaConf.merge(OmegaConf.structured(schema), update)
    except ConfigKeyError as error:
        key = error.full_key or ""
        section, _, name = key.rpartition(".")
        raise UserError(f"{source}: unknown key '{key}'; {nearest(name, _fields_of(schema, section))}") from None
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{source}: {where}{first_line(error)}") from None
    except TypeError:  # omegaconf's own for a list where fields by name belong
        raise UserError(f"{source}: a list stands where names with values belong, such as {{name: value}}") from None


def _fields_of(schema: Any, section: str) -> Iterator[str]:
    """Names of the fields of the section with this dotted name."""
    cls: Any = schema
    for part in filter(None, section.split(".")):
        cls = _dataclass_in(typing.get_type_hints(cls)[re.sub(r"\[.*", "", part)])
    return (f.name for f in dataclasses.fields(cls))


def _dataclass_in(hint: Any) -> Any:
    """The dataclass of ``X`` or ``X | None``."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next(option for option in options if dataclasses.is_dataclass(option))
