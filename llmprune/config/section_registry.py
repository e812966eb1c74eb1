"""The sections of a training job's YAML, and the schema that contains them.

A section is implemented by a class in its own file in ``llmprune/training/sections``; the base class is
``llmprune.training.section.Section``. Other packages add a section by an entry point of the group
``llmprune_sections``.
"""

import dataclasses
import importlib
from functools import cache
from typing import Any, TypeVar

from llmprune.utils.registry import Registry

C = TypeVar("C")
OWN = (  # in the order of their checks and of their callbacks
    "evaluation", "dynamic_loading", "l0_pruning", "trainable", "lora", "block_replacement", "distillation",
)  # fmt: skip

SECTIONS: Registry[Any] = Registry("sections", "section")


def all_sections() -> dict[str, Any]:
    """The class of every section by its name, llmprune's own sections first."""
    for name in OWN:
        importlib.import_module(f"llmprune.training.sections.{name}")
    return _all_sections(SECTIONS.changes)


@cache
def _all_sections(changes: int) -> dict[str, Any]:
    return {name: SECTIONS[name] for name in dict.fromkeys([*OWN, *list(SECTIONS)])}


def with_sections(schema: type[C]) -> type[C]:
    """A job's schema with a field for every section, by default ``None``; every call returns the same class.

    >>> from llmprune.config.schema import Config
    >>> with_sections(Config)().lora is None
    True
    """
    kinds = {name: section.settings for name, section in all_sections().items()}
    made: type[C] = _with(schema, tuple(kinds.items()))  # type: ignore[arg-type] # a class is hashable
    return made


@cache
def _with(schema: type[C], kinds: tuple[tuple[str, Any], ...]) -> type[C]:
    fields = [(name, kind | None, dataclasses.field(default=None)) for name, kind in kinds]
    made = dataclasses.make_dataclass(schema.__name__, fields, bases=(schema,))
    made.__doc__, made.__module__ = schema.__doc__, schema.__module__
    return made


def sections_of(config: Any) -> list[Any]:
    """The sections in a job's YAML, made from their settings and the job's config, in the order of ``all_sections``."""
    found = ((section, getattr(config, name, None)) for name, section in all_sections().items())
    return [section(settings, config) for section, settings in found if settings is not None]
