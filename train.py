"""Run one job: ``composer [-n RANKS] train.py yamls/NAME.yaml [section.key=value …]``."""

import os
import sys
import time

from llmprune.utils.errors import UserError, check_surroundings, one_line
from llmprune.utils.logs import logs_shown
from llmprune.utils.processes import TERMINATION, end_on_signals, end_with_launcher, stopped_by

SAVED_AND_LEFT = 75  # the exit code of a run that was asked to end and can go on: "try again", EX_TEMPFAIL
USAGE = "composer [-n RANKS] train.py yamls/NAME.yaml [section.key=value …]"


def main(arguments: list[str]) -> int:
    """Train as the YAML says.

    Returns:
        0 = done, 2 = a mistake of the user's, told in one line, 75 = asked to end (SIGTERM), saved and left, 130 or
        143 = stopped (Ctrl-C; SIGTERM of a job that saves nothing on the way).
    """
    if not arguments:
        print(f"usage: {USAGE}", file=sys.stderr)
        return 2
    try:
        check_surroundings(arguments)
        with logs_shown():
            return _carry_out(arguments)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            # The launcher kills all ranks when one ends: let rank 0 tell the mistake and set the exit code.
            time.sleep(5)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as error:
        if (code := stopped_by(error)) is None:
            raise
        if os.environ.get("RANK", "0") == "0":
            print("error: stopped; what was complete before stays: run.autoresume=true goes on", file=sys.stderr)
        return code
    except Exception as error:
        if (told := one_line(error)) is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return 2
    finally:
        # Gloo's threads drop what the ranks exchanged last, for which they need the interpreter: were it being torn
        # down by then, they would abort the process.
        time.sleep(0.2)


def _carry_out(arguments: list[str]) -> int:
    from llmprune.callbacks.preemption import Preempted
    from llmprune.config.job_files import describe_jobs, load_job
    from llmprune.config.jobs import JOBS

    TERMINATION.listen()  # again: Composer ends the process at once
    if arguments[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n{describe_jobs()}")
        return 0
    job = load_job(arguments[0], arguments[1:])
    try:
        if job.run.offline:
            from llmprune.jobs.offline import check_offline

            check_offline(job, arguments[0])
        if not JOBS[job.job].goes_on:
            end_on_signals()  # there is nothing to be saved before the end
        JOBS[job.job].run(job)
    except Preempted as left:
        if os.environ.get("RANK", "0") == "0":
            print(left, file=sys.stderr)
        return SAVED_AND_LEFT
    return 0


if __name__ == "__main__":
    TERMINATION.listen()
    end_with_launcher()
    sys.exit(main(sys.argv[1:]))
