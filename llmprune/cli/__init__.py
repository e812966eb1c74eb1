"""The command ``llmprune``: it only delegates. Imports are inside the commands, so that --help is quick."""

import sys

import typer

from llmprune.cli import downloading, evaluating, importing, measuring, pruning, showing  # noqa: F401  # their commands
from llmprune.cli.common import app
from llmprune.utils.errors import UserError, check_surroundings
from llmprune.utils.processes import end_on_signals, end_with_launcher
from llmprune.utils.programs import run_program


def main() -> None:
    """Run the command, alone or as a rank that Composer's launcher started; see ``run_program``."""
    end_with_launcher()
    sys.exit(run_program(_run, "nothing unfinished is left"))


def _run() -> int:
    end_on_signals()
    check_surroundings(sys.argv)
    try:
        return app(sys.argv[1:] or ["--help"], standalone_mode=False) or 0
    except typer.TyperException as error:
        raise UserError(error.format_message()) from None
    except typer.Abort:
        raise KeyboardInterrupt from None
