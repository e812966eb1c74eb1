"""Plug-ins: choices with a name and a description; other packages can add choices by entry points.

A package adds a choice of the kind ``criteria`` by an entry point in the group ``llmprune_criteria``.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import catalogue

from llmprune.utils.errors import UserError, nearest

T = TypeVar("T")
C = TypeVar("C")


class Registry(Mapping[str, T]):
    """The choices of one kind, by name; the first line of a choice's docstring describes it.

    >>> COLOURS = Registry("colours", "colour")
    >>> @COLOURS.register("red")
    ... def red() -> int:
    ...     "Like a rose."
    ...     return 0xFF0000
    >>> COLOURS.describe(), COLOURS.build("red")
    ({'red': 'Like a rose.'}, 16711680)
    """

    def __init__(self, kind: str, word: str) -> None:
        """Make an empty registry.

        Args:
            kind: name of the registry, in the plural, such as "criteria".
            word: word for one choice in messages, such as "criterion".
        """
        self._word = word
        self.changes = 0  # number of registrations; results that depend on all choices are cached until the next one
        self._entries = catalogue.create("llmprune", kind, entry_points=True)

    def register(self, name: str) -> Callable[[C], C]:
        """Make a decorator that registers a choice under ``name``."""

        def decorate(choice: C) -> C:
            self._entries.register(name)(choice)
            self.changes += 1
            return choice

        return decorate

    def __getitem__(self, name: str) -> T:
        """The choice with the name ``name``.

        Raises:
            UserError: there is no such choice.
        """
        if name not in self._entries:
            raise UserError(f"there is no {self._word} '{name}'; {nearest(name, self)}")
        choice: T = self._entries.get(name)
        return choice

    def __iter__(self) -> Iterator[str]:
        """The names of all choices, in the order of registration."""
        return iter(self._entries.get_all())

    def __len__(self) -> int:
        """The number of choices."""
        return len(self._entries.get_all())

    def __contains__(self, name: object) -> bool:
        """Whether there is a choice with the name ``name``."""
        return name in self._entries

    def build(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Call the choice ``name`` with arguments from a YAML, and return its result.

        Args:
            name: name of the choice.
            arguments: keyword arguments of the call; None = no arguments.

        Raises:
            UserError: there is no such choice, or it does not accept these arguments.
        """
        self.check_arguments(name, arguments)
        choice: Any = self[name]
        return choice(**(arguments or {}))

    def check_arguments(self, name: str, arguments: Mapping[str, Any] | None = None) -> None:
        """Check that ``build`` could be called with these arguments.

        Raises:
            UserError: there is no such choice, or it does not accept these arguments.
        """
        choice: Any = self[name]
        if arguments is not None and not isinstance(arguments, Mapping):
            raise UserError(f"{self._word} '{name}': its arguments must be names with values, such as {{scale: 1}}")
        try:
            inspect.signature(choice).bind(**(arguments or {}))
        except TypeError as error:
            raise UserError(f"{self._word} '{name}': {error}") from None

    def describe(self) -> dict[str, str]:
        """The description of every choice, by name."""
        return {name: inspect.cleandoc(self[name].__doc__ or "").splitlines()[0] for name in self}
