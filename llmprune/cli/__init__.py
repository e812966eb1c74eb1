"""The command ``llmprune``: it only delegates. Imports are inside the commands, so that --help is quick."""

import sys

from llmprune.cli import evaluating, measuring, pruning, showing  # noqa: F401  # their commands
from llmprune.cli.options import app
from llmprune.errors import UserError


def main() -> None:
    """Run the command; a mistake of the user's is one line on standard error and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
