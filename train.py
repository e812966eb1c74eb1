"""Run one job: ``composer [-n RANKS] train.py yamls/NAME.yaml [section.key=value …]``."""

import os
import sys
import time

from llmprune.utils.errors import UserError, check_surroundings, one_line
from llmprune.utils.logs import logs_shown
from llmprune.utils.processes import TERMINATION, end_on_signals, end_with_launcher, stopped_by

SAVED_AND_LEFT = 75  # exit code of a run that was asked to end and can be resumed: EX_TEMPFAIL, "try again"
USAGE = "composer [-n RANKS] train.py yamls/NAME.yaml [section.key=value …]"


def main(arguments: list[str]) -> int:
    """Run the job of a YAML.

    Returns:
        The exit code: 0 = done; 2 = a mistake of the user, printed as one line; 75 = asked to end (SIGTERM), and the
        run is saved; 130 or 143 = stopped (Ctrl-C; SIGTERM of a job that saves nothing before its end).
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
            # The launcher kills all ranks when one ends: rank 0 must print the error and set the exit code first.
            time.sleep(5)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit) as error:
        if (code := stopped_by(error)) is None:
            raise
        if os.environ.get("RANK", "0") == "0":
            print("error: stopped; what was complete before stays: run.autoresume=true resumes it", file=sys.stderr)
        return code
    except Exception as error:
        if (told := one_line(error)) is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return 2
    finally:
        # Gloo's threads release the last messages between ranks, and need the interpreter for that; if it were shutting
        # down at that moment, they would abort the process.
        time.sleep(0.2)


def _carry_out(arguments: list[str]) -> int:
    from llmprune.callbacks.preemption import Preempted
    from llmprune.config.job_files import describe_jobs, load_job
    from llmprune.config.jobs import JOBS

    TERMINATION.listen()  # again, because Composer's import sets a handler that ends the process at once
    if arguments[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n{describe_jobs()}")
        return 0
    job = load_job(arguments[0], arguments[1:])
    try:
        if job.run.offline:
            from llmprune.jobs.offline import check_offline

            check_offline(job, arguments[0])
        if not JOBS[job.job].goes_on:
            end_on_signals()  # this kind of job saves nothing before its end
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
