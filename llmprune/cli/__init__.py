"""The command ``llmprune``: it only delegates. Imports are inside the commands, so that --help is quick."""

import sys

import typer

from llmprune.cli import downloading, evaluating, importing, measuring, pruning, showing  # noqa: F401  # their commands
from llmprune.cli.common import app
from llmprune.utils.errors import check_surroundings, one_line
from llmprune.utils.logs import logs_shown
from llmprune.utils.processes import end_on_signals, stopped_by


def main() -> None:
    """Run the command; a mistake of the user is one line on standard error and exit code 2.

    A command that is stopped (Ctrl-C, SIGTERM) leaves no incomplete output, and ends with 130 or 143.
    """
    try:
        end_on_signals()
        check_surroundings(sys.argv)
        with logs_shown():
            sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except typer.TyperException as error:
        _end(error.format_message(), 2)
    except (typer.Abort, KeyboardInterrupt):
        _end("stopped; nothing unfinished is left", 130)
    except SystemExit as ended:
        if (code := stopped_by(ended)) is None:
            raise
        _end("stopped; nothing unfinished is left", code)
    except Exception as error:
        if (told := one_line(error)) is None:
            raise
        _end(told, 2)


def _end(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
