"""Callbacks that other packages register, by the name that a YAML uses under ``callbacks``."""

from collections.abc import Callable, Mapping
from typing import Any

from composer import Callback

from llmprune.utils.registry import Registry

CALLBACKS: Registry[Callable[..., Callback]] = Registry("callbacks", "callback")


def added_callbacks(named: Mapping[str, Mapping[str, Any] | None]) -> list[Callback]:
    """Make registered callbacks.

    Args:
        named: arguments of each callback by its registered name; None = no arguments.

    Raises:
        UserError: a name or an argument is unknown.
    """
    return [CALLBACKS.build(name, arguments) for name, arguments in named.items()]
