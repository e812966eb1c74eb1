"""How every program of llmprune ends: its exit code, and one line about a mistake or a signal."""

import os
import sys
import time
from collections.abc import Callable

from llmprune.utils.errors import one_line
from llmprune.utils.logs import logs_shown
from llmprune.utils.processes import Preempted, stopped_by

MISTAKE = 2  # exit code after a mistake of the user, or of a disk
SAVED_AND_LEFT = 75  # exit code of a job that was asked to end and can be resumed: EX_TEMPFAIL, "try again"


def run_program(work: Callable[[], int], stopped: str) -> int:
    """Run a program, or a rank of it.

    Args:
        work: function that does the work and returns the exit code.
        stopped: what is left after a signal, for the message.

    Returns:
        The exit code: that of ``work``; 2 = a mistake of the user, printed as one line; 75 = asked to end (SIGTERM),
        and what is done is kept; 130 or 143 = stopped (Ctrl-C; SIGTERM of work that keeps nothing).
    """
    rank = os.environ.get("RANK")
    try:
        with logs_shown():
            return work()
    except Preempted as left:
        if rank in (None, "0"):
            print(left, file=sys.stderr)
        return SAVED_AND_LEFT
    except (KeyboardInterrupt, SystemExit) as error:
        if (code := stopped_by(error)) is None:
            raise
        if rank in (None, "0"):
            print(f"error: stopped; {stopped}", file=sys.stderr)
        return code
    except Exception as error:
        if (told := one_line(error)) is None:
            raise
        if rank not in (None, "0"):
            # The launcher kills all ranks when one ends: rank 0 must print the error and set the exit code first.
            time.sleep(5)
        print(f"error: {told}", file=sys.stderr)
        return MISTAKE
    finally:
        if rank is not None:
            # Gloo's threads release the last messages between ranks, and need the interpreter for that; if it were
            # shutting down at that moment, they would abort the process.
            time.sleep(0.2)
