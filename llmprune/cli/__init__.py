"""The command ``llmprune``: it only delegates. Imports are inside the commands, so that --help is quick."""

import sys

import click

from llmprune.cli import evaluating, measuring, pruning, showing  # noqa: F401  # their commands
from llmprune.cli.options import app
from llmprune.errors import UserError


def main() -> None:
    """Run the command; a mistake of the user's is one line on standard error and exit code 2."""
    try:
        sys.exit(app(standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        sys.exit(2)
    except (UserError, click.ClickException) as error:
        print(f"error: {error.format_message() if isinstance(error, click.ClickException) else error}", file=sys.stderr)
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
