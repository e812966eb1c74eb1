"""The command ``llmprune``: it only delegates. Imports are inside the commands, so that --help is quick."""

import sys

import typer

from llmprune.cli import downloading, evaluating, measuring, pruning, showing  # noqa: F401  # their commands
from llmprune.cli.options import app
from llmprune.errors import UserError, disk_error


def main() -> None:
    """Run the command; a mistake of the user's is one line on standard error and exit code 2."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except (UserError, typer.TyperException) as error:
        print(f"error: {getattr(error, 'format_message', error.__str__)()}", file=sys.stderr)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Exception as error:
        if (told := disk_error(error)) is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(2)
