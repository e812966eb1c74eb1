"""Run one job: ``composer [-n RANKS] train.py yamls/NAME.yaml [section.key=value …]``."""

import sys

from llmprune.utils.errors import check_surroundings
from llmprune.utils.processes import TERMINATION, end_on_signals, end_with_launcher
from llmprune.utils.programs import run_program

USAGE = "composer [-n RANKS] train.py yamls/NAME.yaml [section.key=value …]"


def main(arguments: list[str]) -> int:
    """Run the job of a YAML; returns the exit code, see ``run_program``."""
    if not arguments:
        print(f"usage: {USAGE}", file=sys.stderr)
        return 2
    return run_program(lambda: _carry_out(arguments), "what was complete before stays: run.autoresume=true resumes it")


def _carry_out(arguments: list[str]) -> int:
    check_surroundings(arguments)
    from llmprune.config.job_files import describe_jobs, load_job
    from llmprune.config.jobs import JOBS

    TERMINATION.listen()  # again, because Composer's import sets a handler that ends the process at once
    if arguments[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n{describe_jobs()}")
        return 0
    job = load_job(arguments[0], arguments[1:])
    if job.run.offline:
        from llmprune.jobs.offline import check_offline

        check_offline(job, arguments[0])
    if not JOBS[job.job].goes_on:
        end_on_signals()  # this kind of job saves nothing before its end
    JOBS[job.job].run(job)
    return 0


if __name__ == "__main__":
    TERMINATION.listen()
    end_with_launcher()
    sys.exit(main(sys.argv[1:]))
