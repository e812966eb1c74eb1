"""The task suites of the papers: tasks of lm-eval with each paper's shots and metric."""

from collections.abc import Sequence
from dataclasses import dataclass

NORMALISED = ("hellaswag", "arc_challenge", "openbookqa")  # averages use acc_norm of these tasks, acc of all others
METRICS = {
    "lambada_openai": "acc",
    "nq_open": "exact_match",
    "gsm8k": "exact_match",
    **dict.fromkeys(NORMALISED, "acc_norm"),
}


@dataclass(frozen=True)
class TaskRun:
    """A task with a number of shots.

    Attributes:
        task: name of the task in lm-eval.
        shots: number of examples in the prompt; None = the task's own default.
    """

    task: str
    shots: int | None = None

    @property
    def metric(self) -> str:
        """The metric that is used in averages."""
        return METRICS.get(self.task, "acc")


def _runs(shots: int | Sequence[int], *tasks: str) -> tuple[TaskRun, ...]:
    counts = (shots,) if isinstance(shots, int) else shots
    return tuple(TaskRun(task, count) for task in tasks for count in counts)


COMMONSENSE = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")

SUITES: dict[str, tuple[TaskRun, ...]] = {
    # Shortened LLaMA, arXiv:2402.02834, section 4.1
    "commonsense7": _runs(0, *COMMONSENSE),
    # Reassessing Layer Pruning, arXiv:2411.15558, section 3
    "reassessing8": _runs(
        0, "piqa", "hellaswag", "openbookqa", "arc_easy", "arc_challenge", "mmlu", "cmmlu", "winogrande"
    ),
    # LLM-Streamline, arXiv:2403.19135, the table of its released models
    "streamline7": _runs(0, "arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "rte", "winogrande"),
    # Sheared-LLaMA, arXiv:2310.06694
    "sheared": (
        *_runs((0, 5), "arc_easy", "lambada_openai", "logiqa", "piqa", "sciq", "winogrande", "wsc"),
        *_runs((0, 5, 25), "arc_challenge"),
        *_runs(10, "hellaswag"),
        *_runs(5, "mmlu"),
        *_runs(0, "truthfulqa_mc2"),
        *_runs(32, "boolq", "nq_open"),
        *_runs(8, "gsm8k"),
    ),
}


def expand(names: Sequence[str], shots: int | None = None) -> list[TaskRun]:
    """The task runs of suites and tasks, each once; a task that is also in a named suite runs with the suite's shots.

    Args:
        names: names of suites in ``SUITES`` or of tasks in lm-eval.
        shots: number of shots for all of them, instead of their own; None = their own.
    """
    runs = [run for name in names for run in SUITES.get(name, (TaskRun(name),))]
    of_suites = {run.task for run in runs if run.shots is not None}
    runs = [run for run in runs if run.shots is not None or run.task not in of_suites]
    if shots is not None:
        runs = [TaskRun(run.task, shots) for run in runs]
    return list(dict.fromkeys(runs))
