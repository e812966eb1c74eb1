"""Options and functions that several commands use."""

import shlex
import sys
from typing import Annotated

import typer

from llmprune.utils.errors import UserError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]
Out = Annotated[str, typer.Option(help="Folder to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
PushToHub = Annotated[str | None, typer.Option(help="Also upload OUT to the Hugging Face hub under this name.")]


def names_in(text: str | None) -> list[str] | None:
    """The names in a list separated by commas."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def sizes_in(text: str) -> dict[str, int]:
    """The sizes in a list such as ``layers=24,hidden=2048``.

    Raises:
        UserError: the text is not such a list.
    """
    sizes: dict[str, int] = {}
    for item in names_in(text) or ():
        name, _, size = item.partition("=")
        if name.strip() in sizes:
            raise UserError(f"'{name.strip()}' is given twice in --shape")
        if not size.strip().isdecimal():
            raise UserError(f"'{item}' is no size: write --shape layers=24,hidden=2048")
        sizes[name.strip()] = int(size)
    return sizes


def command_line() -> str:
    """The command line of this process, so that a user can repeat it."""
    return shlex.join(["llmprune", *sys.argv[1:]])


def numbers_in(text: str, option: str) -> list[int]:
    """The whole numbers in a list separated by commas.

    Raises:
        UserError: an item is not a whole number.
    """
    try:
        return [int(number) for number in names_in(text) or ()]
    except ValueError:
        raise UserError(f"{option} must be whole numbers separated by commas; got '{text}'") from None


@app.callback()
def llmprune(
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare models and checkpoints with their checksums before using them.")
    ] = False,
) -> None:
    """Prune large language models and train them back."""
    if verify:
        from llmprune.utils.checksums import VERIFICATION

        VERIFICATION.asked = True
