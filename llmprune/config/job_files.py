"""Jobs as YAML files: reading, writing, describing.

A job is one YAML file, with ``key=value`` overrides. It may name another YAML file as its ``base``.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from llmprune.config.jobs import JOBS, Job
from llmprune.config.schema import Config, ScoringConfig
from llmprune.config.section_registry import with_sections
from llmprune.config.yaml_files import check_yaml, read_yaml, refuse_secrets
from llmprune.utils.errors import UserError, first_line, nearest
from llmprune.utils.files import write_text
from llmprune.utils.recorded_settings import as_typed, literal, remember
from llmprune.utils.settings import check_settings, check_word, dataclass_in, hints_of, meanings_of

J = TypeVar("J")
MOST = 1e30  # largest number of a setting: within float32, and more than any run needs


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Config | ScoringConfig:
    """Read the YAML of any job and apply overrides; its key ``job`` names the kind of job (``config/jobs.py``).

    Args:
        path: path of the YAML file.
        overrides: texts ``section.key=value``; later ones win; a value in braces replaces the whole mapping.

    Raises:
        UserError: the file can't be read, a key is unknown, a value has the wrong type or is missing.
    """
    sections = _read(Path(path))
    named = [_given(text, "job", text)["job"] for text in overrides if text.partition("=")[0].strip() == "job"]
    job = JOBS[str([sections.get("job", "train"), *named][-1])]
    _refuse_foreign(path, {*sections} - _keys_of(job))
    config: Config | ScoringConfig = _load(path, sections, overrides, _schema_of(job))
    if job.needs is not None and getattr(config, job.needs) is None:
        raise UserError(f"{path}: job {config.job} needs the section {job.needs}")
    return config


def _refuse_foreign(path: str | Path, foreign: set[str]) -> None:
    """Raise ``UserError`` for sections of another job, and name the job that has most of them."""
    found = {name: sorted(_keys_of(JOBS[name]) & foreign) for name in JOBS}
    name = max(found, key=lambda name: len(found[name]))
    if found[name]:
        raise UserError(f"{path}: the section {found[name][0]} belongs to another job: write job: {name}")


def _keys_of(job: Job) -> set[str]:
    return {key.name for key in dataclasses.fields(_schema_of(job))}


def load_training_job(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML of a job that trains and apply overrides.

    Raises:
        UserError: see ``load_job``; or the job is of another kind.
    """
    return training_job(load_job(path, overrides), path)


def training_job(config: Config | ScoringConfig, path: str | Path = "the config") -> Config:
    """The config of a job, if the job only trains.

    Raises:
        UserError: the job is of another kind.
    """
    if not isinstance(config, Config) or JOBS[config.job].schema is not Config:
        raise UserError(f"{path} is another kind of job ({config.job}): run it with `composer train.py`")
    return config


def _schema_of(job: Job) -> type[Any]:
    if not issubclass(job.schema, Config):
        return job.schema
    return with_sections(job.schema)  # type: ignore[arg-type] # a class is hashable


def load_recorded(path: Path) -> Config | ScoringConfig:
    """Read a run's config.yaml from any source: interpolations stay texts, and no other file is read.

    Raises:
        UserError: see ``load_job``.
    """
    sections = read_yaml(path)
    schema = _schema_of(JOBS[str(sections.get("job", "train"))])
    merged = _merge(schema, literal(sections), str(path))
    config: Config | ScoringConfig = _built(merged, schema, path)
    return config


def _load(path: str | Path, loaded: dict[str, Any], overrides: Sequence[str], schema: type[J]) -> J:
    refuse_secrets(loaded)
    _merge(schema, loaded, str(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        refuse_secrets(text, key)
        refuse_secrets(override, "an override")
        if not separator:
            raise UserError(f"'{override}' is not of the form section.key=value")
        given = _given(override, key, text)
        _merge(schema, given, f"'{override}'")
        _lay_over(loaded, given, len(_parts(key)))
    merged = _merge(schema, loaded, str(path))
    config = _built(merged, schema, path)
    values = dataclasses.asdict(config)  # type: ignore[call-overload]
    refuse_secrets(values)
    _check_numbers(values)
    check_settings(config)
    remember(OmegaConf.to_container(merged, resolve=False), values)
    return config


def _given(override: str, key: str, text: str) -> Any:
    """A mapping of sections that contains only an override, with interpolations as they are written."""
    try:
        check_yaml(text)
        return OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=False)
    except YAMLError:
        raise UserError(f"'{override}' is no valid value: put quotes around the whole ('{key}={{…}}')") from None
    except (OmegaConfBaseException, ValueError, LookupError) as error:
        raise UserError(f"'{key}' can't be set: {first_line(error)}") from None


def _parts(key: str) -> list[Any]:
    """The names in a dotted key."""
    parts, sections = [], OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}=null"]))
    while isinstance(sections, dict):
        ((name, sections),) = sections.items()
        parts.append(name)
    return parts


def _lay_over(sections: dict[str, Any], given: Any, depth: int) -> None:
    """Replace a value in ``sections`` by the one in ``given`` that is ``depth`` names below the top."""
    for _ in range(depth - 1):
        ((name, given),) = given.items()
        if not isinstance(sections.get(name), dict):
            sections[name] = {}
        sections = sections[name]
    sections.update(given)


def _built(merged: Any, schema: type[J], path: str | Path) -> J:
    try:
        OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise UserError(f"{path}: {error.full_key or 'a key'} must be set") from None
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise UserError(f"{path}: {where}{first_line(error)}") from None
    assert isinstance(config, schema)
    return config


def _check_numbers(values: Any, key: str = "") -> None:
    """Raise ``UserError`` for numbers that are too large or not finite."""
    if isinstance(values, dict | list):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            _check_numbers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, int) and abs(values) >= 2**63:
        raise UserError(f"{key} has {len(str(abs(values)))} digits: it must be smaller than 2**63")
    elif isinstance(values, float) and not abs(values) <= MOST:  # also NaN
        raise UserError(f"{key} is {values}; it must be a number of at most {MOST:g}")


def _read(path: Path) -> dict[str, Any]:
    """A YAML file merged over the file that its key ``base`` names (a path relative to it)."""
    layers: list[dict[str, Any]] = []
    seen: set[Path] = set()
    while True:
        layers.append(read_yaml(path))
        base = layers[-1].pop("base", None)
        if base is None:
            break
        if not isinstance(base, str) or "\0" in base:
            raise UserError(f"{path}: base must be the name of a YAML file; got {str(base)[:80]!r}")
        seen.add(path.resolve())
        path = path.parent / base
        if path.resolve() in seen:
            raise UserError(f"{path} is a base of itself: leave out its key base")
    merged = OmegaConf.merge(*reversed(layers))
    return {str(key): value for key, value in OmegaConf.to_container(merged, resolve=False).items()}  # type: ignore[union-attr]


def save_config(config: Config | ScoringConfig, path: Path) -> None:
    """Write the config as YAML; interpolations of environment variables are written as they were typed."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(as_typed(literal(dataclasses.asdict(config))))))


def describe_jobs() -> str:
    """Every section and key of every job's YAML with default and meaning, as text."""
    lines: list[str] = []
    shown: set[str] = set()
    for name in JOBS:
        job = JOBS[name]
        lines += [f"## job: {name}  # {job.about}"]
        schema = _schema_of(job)
        known = shown if issubclass(schema, Config) else set()
        shown = shown | {key.name for key in dataclasses.fields(schema)}
        for section in dataclasses.fields(schema):
            cls = dataclass_in(hints_of(schema)[section.name])
            if section.name in known:
                continue
            if cls is None:
                lines += ["", *_describe_key(section, meanings_of(schema).get(section.name))]
                continue
            optional = " (optional)" if section.default is None else ""
            lines += ["", f"{section.name}:{optional}  # {inspect.cleandoc(cls.__doc__).splitlines()[0]}"]
            lines += _describe_fields(cls, "  ")
        lines += [""]
    return "\n".join(lines[:-1])


def _describe_fields(cls: Any, indent: str) -> list[str]:
    lines, meanings = [], meanings_of(cls)
    for key in dataclasses.fields(cls):
        hint = hints_of(cls)[key.name]
        meaning = f"  # {meanings[key.name]}" if key.name in meanings else ""
        nested = next((t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)), None)
        if nested is not None:
            lines += [f"{indent}{key.name}:{meaning}", *_describe_fields(nested, indent + "  ")]
            continue
        lines += [f"{indent}{line}" for line in _describe_key(key, meanings.get(key.name))]
    return lines


def _describe_key(key: "dataclasses.Field[Any]", meaning: str | None) -> list[str]:
    default = key.default if key.default_factory is dataclasses.MISSING else key.default_factory()
    shown = "(required)" if default is MISSING else "null" if default is None else str(default)
    return [f"{key.name}: {shown}" + ("" if meaning is None else f"  # {meaning}")]


def _merge(schema: Any, update: Any, source: str) -> Any:
    try:
        return OmegaConf.merge(OmegaConf.structured(schema), update)
    except ConfigKeyError as error:
        key = error.full_key or ""
        section, _, name = key.rpartition(".")
        raise UserError(f"{source}: unknown key '{key}'; {nearest(name, _fields_of(schema, section))}") from None
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        check_word(error.value, _hint_of(schema, key), f"{source}: {key}")
        raise UserError(f"{source}: {key}{': ' if key else ''}{first_line(error)}") from None
    except TypeError:  # omegaconf raises it for a list in place of a mapping
        raise UserError(f"{source}: a list was given in place of names with values, such as {{name: value}}") from None


def _fields_of(schema: Any, section: str) -> Iterator[str]:
    """Names of the fields of the section with a dotted name."""
    cls = dataclass_in(_hint_of(schema, section))
    return (f.name for f in dataclasses.fields(cls))


def _hint_of(schema: Any, key: str) -> Any:
    """The type of the value with a dotted key; for an item of a mapping or list, the type of the whole."""
    hint: Any = schema
    for part in filter(None, key.split(".")):
        cls = dataclass_in(hint)
        if cls is not None:
            hint = hints_of(cls)[re.sub(r"\[.*", "", part)]
    return hint
