"""Settings: dataclasses whose fields say which values are possible.

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
    """Numbers that a setting may have; a bound that is ``None`` does not limit it.

    Attributes:
        least: the smallest number.
        above: the number must be greater than this.
        most: the greatest number.
        below: the number must be smaller than this.
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
        """The range in words that follow "it must".

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
    """A field of a settings dataclass that holds a number, or a list or mapping of numbers, within a range.

    Args:
        default: of the field.
        least: the smallest number.
        above: the number must be greater than this.
        most: the greatest number.
        below: the number must be smaller than this.
        make: makes the default of a field that holds a list or a mapping.
    """
    limits = {"range": Range(least, above, most, below)}
    if make is not dataclasses.MISSING:
        return dataclasses.field(default_factory=make, metadata=limits)
    return dataclasses.field(default=default, metadata=limits)


def check_settings(settings: Any, key: str = "") -> None:
    """See that every value of a settings dataclass, and of those within it, is one of its field's.

    Args:
        settings: the dataclass.
        key: its place in the YAML, such as ``train``; the message names ``train.batch_size`` then.

    Raises:
        UserError: a word is not in the field's ``Literal``, or a number is out of its range.
    """
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"{key}.{field.name}" if key else field.name
        if dataclasses.is_dataclass(value):
            check_settings(value, name)
            continue
        hint = hints_of(type(settings))[field.name]
        for place, one in _leaves(value, name):
            check_word(one, hint, place)
            limits = field.metadata.get("range")
            if limits is not None and isinstance(one, int | float) and not limits.has(one):
                others = [*words_of(hint), *(["null"] if type(None) in typing.get_args(hint) else [])]
                raise UserError(f"{place} is {one}; it must {limits}{''.join(f', or {other}' for other in others)}")


def check_word(value: Any, hint: Any, key: str) -> None:
    """See that a word is one of those that a field's type lists.

    Args:
        value: what the field has.
        hint: the field's type; one that lists no words allows any value.
        key: the field's place, for the message.

    Raises:
        UserError: it is another word.
    """
    words = words_of(hint)
    if words and isinstance(value, str) and value not in words:
        raise UserError(f"{key} '{value:.80}' is unknown; valid: {', '.join(words)}")


def words_of(hint: Any) -> tuple[str, ...]:
    """The words of every ``Literal`` in a type.

    >>> words_of(list[Literal["lm", "kl"]] | None)
    ('lm', 'kl')
    """
    if typing.get_origin(hint) is Literal:
        return tuple(word for word in typing.get_args(hint) if isinstance(word, str))
    return tuple(word for each in typing.get_args(hint) for word in words_of(each))


def dataclass_in(hint: Any) -> Any:
    """The dataclass in a type such as ``X`` or ``X | None``; ``None`` = it has none."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def hints_of(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    return typing.get_type_hints(cls)


def meanings_of(cls: Any) -> dict[str, str]:
    """What a dataclass's docstring, and those that it inherits from, say of each attribute."""
    inherited = meanings_of(cls.__mro__[1]) if len(cls.__mro__) > 2 else {}
    told = parse(inspect.cleandoc(cls.__doc__ or ""), DocstringStyle.GOOGLE).params
    return inherited | {each.arg_name: " ".join((each.description or "").split()) for each in told}


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """A value, or those of a list or mapping, each with its place."""
    if isinstance(value, list | tuple):
        for index, one in enumerate(value):
            yield from _leaves(one, f"{name}[{index}]")
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _leaves(one, f"{name}.{key}")
    else:
        yield name, value
