"""Callbacks that other packages bring along, by the name that a YAML gives under ``callbacks``."""

from collections.abc import Callable, Mapping
from typing import Any

from composer import Callback

from llmprune.utils.registry import Registry

CALLBACKS: Registry[Callable[..., Callback]] = Registry("callbacks", "callback")


def added_callbacks(named: Mapping[str, Mapping[str, Any] | None]) -> list[Callback]:
    """Make registered callbacks.

    Args:
        named: their names, each with the arguments of what is registered (usually the class); None = no arguments.

    Raises:
        UserError: a name or an argument is unknown.
    """
    return [CALLBACKS.build(name, arguments) for name, arguments in named.items()]
