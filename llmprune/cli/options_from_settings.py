"""Options of a command from the fields of a settings dataclass, which defines their names, help texts and defaults."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from typing import Annotated, Any

import typer

from llmprune.cli.common import names_in, sizes_in
from llmprune.utils.settings import dataclass_in, hints_of, meanings_of, words_of

Command = Callable[..., None]


@dataclasses.dataclass(frozen=True)
class _Option:
    """An option of a command.

    Attributes:
        name: name of the command's parameter, such as ``seq_len`` for ``--seq-len``.
        path: names of the fields from the settings dataclass to the option's field.
        parameter: parameter of the command's signature for typer.
        read: function that makes the field's value from typer's value.
    """

    name: str
    path: tuple[str, ...]
    parameter: inspect.Parameter
    read: Callable[[Any], Any]


def options_from_settings(
    names: Mapping[str, str] | None = None, leave_out: typing.Container[str] = ()
) -> Callable[[Command], Command]:
    """Make a decorator that gives a command an option for every field of the settings dataclasses in its parameters.

    A parameter ``plan: PlanConfig`` becomes ``--criterion``, ``--remove`` and so on; the command gets the dataclass.
    A parameter ``budget: BudgetConfig | None`` is None if none of its options is given.

    Args:
        names: names of options that differ from their field's name, by the field's dotted name: ``{"data.path":
            "data"}``.
        leave_out: dotted names of fields that have no option.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        parameters: list[inspect.Parameter] = []
        groups: dict[str, tuple[Any, bool, list[_Option]]] = {}
        for parameter in signature.parameters.values():
            cls = dataclass_in(parameter.annotation)
            if cls is None:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            optional = type(None) in typing.get_args(parameter.annotation)
            options = [
                option
                for option in _options(cls, dict(names or {}), optional=optional)
                if ".".join(option.path) not in leave_out
            ]
            groups[parameter.name] = cls, optional, options
            parameters += [option.parameter for option in options]
        _name_options([option for *_, options in groups.values() for option in options])

        @wraps(command)
        def run(**values: Any) -> None:
            for name, (cls, optional, options) in groups.items():
                given = {option.path: option.read(values.pop(option.name)) for option in options}
                asked = {path: value for path, value in given.items() if value is not None}
                values[name] = None if optional and not asked else _settings(cls, asked)
            command(**values)

        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _options(cls: Any, names: Mapping[str, str], path: tuple[str, ...] = (), *, optional: bool) -> Iterator[_Option]:
    for field in dataclasses.fields(cls):
        hint, own = hints_of(cls)[field.name], (*path, field.name)
        if (inner := dataclass_in(hint)) is not None:
            yield from _options(inner, names, own, optional=optional)
            continue
        name = names.get(".".join(own), field.name)
        kind, read = _read(hint)
        default = None if field.default in (dataclasses.MISSING, ()) else field.default
        text = meanings_of(cls).get(field.name, "")
        if optional and default is not None:
            default, text = None, f"{text.rstrip('.')}; default: {default}."
        panel = cls.__name__.removesuffix("Config") if optional or path else None
        option = typer.Option(_flag(name), help=_help(text), rich_help_panel=panel, metavar=_metavar(hint))
        yield _Option(
            name,
            own,
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[kind if default is not None else kind | None, option],
            ),
            read,
        )


def _read(hint: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The type that typer uses for a field of this type, and the function that makes the field's value from typer's."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    kinds = [kind for kind in options if kind is not type(None)]
    origin = typing.get_origin(kinds[0])
    if int in kinds and words_of(hint):
        return str, _number_or_word
    if origin in (list, Sequence):
        return str, names_in
    if origin is dict:
        return str, lambda text: None if text is None else sizes_in(text)
    return kinds[0], lambda value: value


def _metavar(hint: Any) -> str | None:
    """How the value of a field with several values is written; None = typer's own words."""
    kinds = {typing.get_origin(kind) for kind in (hint, *typing.get_args(hint))}
    return "<a,b,…>" if kinds & {list, Sequence} else "<name=size,…>" if dict in kinds else None


def _number_or_word(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _help(text: str) -> str:
    """A field's description as a sentence, with the terms of a command line."""
    text = text.replace("null = ", "default: ").replace(" null", " none")
    return f"{text[:1].upper()}{text[1:]}"


def _name_options(options: Sequence[_Option]) -> None:
    """In the help texts of a command's options, replace names of fields in double backquotes by their options."""
    flags = {option.path[-1]: _flag(option.name) for option in options}
    for option in options:
        info = typing.get_args(option.parameter.annotation)[1]
        info.help = re.sub("``(.*?)``", lambda match: flags.get(match[1], match[1]), info.help)


def _settings(cls: Any, given: Mapping[tuple[str, ...], Any]) -> Any:
    values: dict[str, Any] = {path[0]: value for path, value in given.items() if len(path) == 1}
    for field in dataclasses.fields(cls):
        if (inner := dataclass_in(hints_of(cls)[field.name])) is not None:
            values[field.name] = _settings(inner, {path[1:]: v for path, v in given.items() if path[0] == field.name})
    return cls(**values)
