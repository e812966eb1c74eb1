"""Settings: dataclasses whose fields define the possible values.

A ``Literal`` lists words, ``limited`` gives a range::

    precision: Literal["fp32", "amp_bf16"] = "fp32"
    batch_size: int = limited(8, least=1)
"""

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from docstring_parser import DocstringStyle, parse

from llmprune.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of numbers that a setting may have; a bound of ``None`` is no limit.

    Attributes:
        least: smallest number allowed.
        above: lower bound; the number must be greater.
        most: greatest number allowed.
        below: upper bound; the number must be smaller.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def has(self, value: float) -> bool:
        """Whether a number is in the range; NaN and infinity never are."""
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
            and math.isfinite(value)
        )

    def __str__(self) -> str:
        """Text of the range that follows "it must" in a message.

        >>> str(Range(least=0, below=1))
        'lie in [0, 1)'
        """
        low = self.above if self.least is None else self.least
        high = self.below if self.most is None else self.most
        if low is not None and high is not None:
            if self.least is not None and self.most is not None:
                return f"lie between {low:,} and {high:,}"
            return f"lie in {'(' if self.least is None else '['}{low:,}, {high:,}{')' if self.most is None else ']'}"
        if high is not None:
            return f"be {'smaller than' if self.most is None else 'at most'} {high:,}"
        if self.least == 0:
            return "be zero or positive"
        if self.above == 0 or self.least == 1:
            return "be positive"
        return f"be {'more than' if self.least is None else 'at least'} {low:,}"


def limited(
    default: Any = dataclasses.MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    make: Any = dataclasses.MISSING,
) -> Any:
    """Define a field of a settings dataclass for a number, or a list or mapping of numbers, within a range.

    Args:
        default: default value of the field.
        least: smallest number allowed.
        above: lower bound; the number must be greater.
        most: greatest number allowed.
        below: upper bound; the number must be smaller.
        make: function that makes the default value of a field with a list or a mapping.
    """
    limits = {"range": Range(least, above, most, below)}
    if make is not dataclasses.MISSING:
        return dataclasses.field(default_factory=make, metadata=limits)
    return dataclasses.field(default=default, metadata=limits)


def check_settings(settings: Any, key: str = "") -> None:
    """Check that every value of a settings dataclass, and of the dataclasses within it, is allowed by its field.

    Args:
        settings: dataclass to check.
        key: key of the dataclass in the YAML, such as ``train``; messages then name ``train.batch_size``.

    Raises:
        UserError: a word is not in the field's ``Literal``, or a number is out of its range.
    """
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{key}.{field.name}" if key else field.name
        if dataclasses.is_dataclass(value):
            check_settings(value, name)
            continue
        hint = hints_of(type(settings))[field.name]
        if _is_word(hint):
            check_word(value, hint, name)
            continue
        for place, one in _leaves(value, name):
            check_word(one, hint, place)
            limits = field.metadata.get("range")
            if limits is not None and isinstance(one, int | float) and not limits.has(one):
                others = [*words_of(hint), *(["null"] if type(None) in typing.get_args(hint) else [])]
                raise UserError(f"{place} is {one}; it must {limits}{''.join(f', or {other}' for other in others)}")


def check_word(value: Any, hint: Any, key: str) -> None:
    """Check that a word is one of those that a field's type lists.

    Args:
        value: value of the field.
        hint: type of the field; a type that lists no words allows any value.
        key: key of the field, for the message.

    Raises:
        UserError: the word is not in the list.
    """
    words = words_of(hint)
    if not words or (value is None and type(None) in typing.get_args(hint)):
        return
    if (isinstance(value, str) or _is_word(hint)) and value not in words:
        numbers = ["or a number"] if {int, float} & {*typing.get_args(hint)} else []
        raise UserError(f"{key} '{value!s:.80}' is unknown; valid: {', '.join([*words, *numbers])}")


def _is_word(hint: Any) -> bool:
    """Return whether a type allows words of a ``Literal`` and nothing else but None."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return all(kind is type(None) or typing.get_origin(kind) is Literal for kind in kinds)


def words_of(hint: Any) -> tuple[str, ...]:
    """The words of every ``Literal`` in a type.

    >>> words_of(list[Literal["lm", "kl"]] | None)
    ('lm', 'kl')
    """
    if typing.get_origin(hint) is Literal:
        return tuple(word for word in typing.get_args(hint) if isinstance(word, str))
    return tuple(word for each in typing.get_args(hint) for word in words_of(each))


def dataclass_in(hint: Any) -> Any:
    """The dataclass in a type such as ``X`` or ``X | None``; ``None`` = there is no dataclass in it."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def hints_of(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    return typing.get_type_hints(cls)


def meanings_of(cls: Any) -> dict[str, str]:
    """The descriptions of a dataclass's attributes from its docstring and those of its base classes, by name."""
    inherited = meanings_of(cls.__mro__[1]) if len(cls.__mro__) > 2 else {}
    told = parse(inspect.cleandoc(cls.__doc__ or ""), DocstringStyle.GOOGLE).params
    return inherited | {each.arg_name: " ".join((each.description or "").split()) for each in told}


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield a value, or the values in a list or mapping, each with its key."""
    if isinstance(value, list | tuple):
        for index, one in enumerate(value):
            yield from _leaves(one, f"{name}[{index}]")
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _leaves(one, f"{name}.{key}")
    else:
        yield name, value
