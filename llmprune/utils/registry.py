"""Plug-ins: named, described choices, which other packages can add to by entry points.

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
            kind: its name, in the plural.
            word: what one choice is called in messages.
        """
        self._word = word
        self.changes = 0  # how often a choice was registered: what follows from all choices is kept until the next
        self._entries = catalogue.create("llmprune", kind, entry_points=True)

    def register(self, name: str) -> Callable[[C], C]:
        """A decorator that registers a choice under ``name``."""

        def decorate(choice: C) -> C:
            self._entries.register(name)(choice)
            self.changes += 1
            return choice

        return decorate

    def __getitem__(self, name: str) -> T:
        """The choice called ``name``.

        Raises:
            UserError: there is none.
        """
        if name not in self._entries:
            raise UserError(f"there is no {self._word} '{name}'; {nearest(name, self)}")
        choice: T = self._entries.get(name)
        return choice

    def __iter__(self) -> Iterator[str]:
        """The names of all choices, in the order they were registered in."""
        return iter(self._entries.get_all())

    def __len__(self) -> int:
        """How many choices there are."""
        return len(self._entries.get_all())

    def __contains__(self, name: object) -> bool:
        """Whether there is a choice called ``name``."""
        return name in self._entries

    def build(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """What the choice called ``name`` makes of arguments that a YAML gives.

        Args:
            name: of the choice.
            arguments: of its call; None = none.

        Raises:
            UserError: there is no such choice, or it does not take these arguments.
        """
        self.check_arguments(name, arguments)
        choice: Any = self[name]
        return choice(**(arguments or {}))

    def check_arguments(self, name: str, arguments: Mapping[str, Any] | None = None) -> None:
        """See that ``build`` could be called with these.

        Raises:
            UserError: there is no such choice, or it does not take these arguments.
        """
        choice: Any = self[name]
        if arguments is not None and not isinstance(arguments, Mapping):
            raise UserError(f"{self._word} '{name}': its arguments must be names with values, such as {{scale: 1}}")
        try:
            inspect.signature(choice).bind(**(arguments or {}))
        except TypeError as error:
            raise UserError(f"{self._word} '{name}': {error}") from None

    def describe(self) -> dict[str, str]:
        """Every choice with its description."""
        return {name: inspect.cleandoc(self[name].__doc__ or "").splitlines()[0] for name in self}
