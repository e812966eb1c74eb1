"""Settings in the files that a run writes.

A text that a job takes from the environment, such as ``${oc.env:DATA}/web``, is recorded as it was typed, never as its
resolved value. Recorded values are read literally: nothing in them is resolved, whoever wrote them. Numbers from the
environment are recorded as numbers, because a run can be repeated only with the same numbers.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from omegaconf import OmegaConf

from llmprune.utils.errors import UserError

T = TypeVar("T")
_LOOK_UP = re.compile(r"\$\{[^{}]*:")  # an interpolation from outside the job, such as the environment


@dataclass(frozen=True)
class _Text:
    typed: str
    came_to: str


_TEXTS: dict[str, _Text] = {}  # texts of this process's job, by key


def remember(typed: Any, came_to: Any) -> None:
    """Store the texts of a job that come from outside it; those of an earlier job are forgotten.

    Args:
        typed: nested values of the job with interpolations.
        came_to: nested values of the job, resolved.

    Raises:
        UserError: a whole section comes from outside: it could not be recorded.
    """
    _TEXTS.clear()
    raw, resolved = dict(leaves(typed)), dict(leaves(came_to))
    if not any(isinstance(value, str) and _LOOK_UP.search(value) for value in raw.values()):
        return
    for key, text in raw.items():
        if isinstance(text, str) and "${" in text:
            if key not in resolved:
                raise UserError(
                    f"{key} is a whole section from elsewhere: in a job that takes texts from the "
                    "environment, write out its keys"
                )
            if isinstance(value := resolved[key], str) and value:
                _TEXTS[key] = _Text(text, value)


def as_typed(values: Any, key: str = "") -> Any:
    """Values for a record: texts from outside the job, and paths that begin with such a text, as they were typed.

    Args:
        values: nested values.
        key: key of the values in the job, such as ``data.path``.
    """
    if isinstance(values, Mapping):
        return {name: as_typed(value, f"{key}.{name}" if key else str(name)) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [as_typed(value, f"{key}.{place}") for place, value in enumerate(values)]
    if not isinstance(values, str):
        return values
    if key in _TEXTS and _TEXTS[key].came_to == values:
        return _TEXTS[key].typed
    for text in _TEXTS.values():
        if "/" in text.came_to and (values == text.came_to or values.startswith(text.came_to.rstrip("/") + "/")):
            return text.typed + values[len(text.came_to) :]
    return values


def leaves(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value within nested mappings and lists, with its dotted key."""
    if isinstance(values, dict | list):
        for name, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, values


def literal(values: Any) -> Any:
    """The values with every ``${`` escaped, so that OmegaConf resolves nothing."""
    if isinstance(values, Mapping):
        return {name: literal(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [literal(value) for value in values]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", values) if isinstance(values, str) else values


def settings_from(schema: type[T], values: Any) -> T:
    """Make a dataclass from recorded values; types are checked, and nothing is resolved.

    Raises:
        OmegaConfBaseException, TypeError, ValueError: the values do not fit.
    """
    found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), literal(values)))
    assert isinstance(found, schema)
    return found
