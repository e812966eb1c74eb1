"""Tasks of the lm-evaluation-harness, run through its Python API."""

import json
import logging
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.models import huggingface
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager, get_task_dict
from lm_eval.utils import handle_non_serializable
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.evaluation.settings import TasksConfig
from llmprune.evaluation.suites import SUITES, expand
from llmprune.models.loaded import check_vocabulary
from llmprune.utils.errors import UserError, nearest
from llmprune.utils.progress import Progress

_FUNCTION = re.compile(r"!function\s+(\S+)")  # reference to Python code in a task file

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskResults:
    """The results of tasks.

    Attributes:
        tasks: metrics by task; a task that ran at several numbers of shots has the names TASK@SHOTS.
        averages: mean of the tasks' main metrics, by suite, for every named suite.
        samples: lm-eval's log of every question, by task.
    """

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    averages: dict[str, float] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


@lru_cache
def task_manager(include_path: str | None) -> TaskManager:
    """lm-eval's index of all tasks; making it takes seconds.

    A user's own task files may name Python functions, which lm-eval runs: if there are such functions, this is logged
    once.
    """
    if include_path is not None and (named := _functions_in(Path(include_path))):
        log.warning(
            "%s holds task files that name Python code, which runs when their tasks are loaded: %s",
            include_path,
            ", ".join(named[:5]) + (", …" if len(named) > 5 else ""),
        )
    return TaskManager(include_path=include_path)


class Tasks:
    """The chosen tasks with their data."""

    def __init__(self, config: TasksConfig, *, generate: bool = True) -> None:
        """Find every task and load its data.

        Args:
            config: settings of the tasks.
            generate: whether tasks are allowed to generate text.

        Raises:
            UserError: a task is unknown, its data are not available, or it can't be run here.
        """
        config.check()
        self.config = config
        self.runs = expand(config.names, config.num_fewshot)
        if config.include_path is not None and not Path(config.include_path).is_dir():
            raise UserError(f"{config.include_path} is no folder with task files")
        with quiet(), _random_state_kept():
            for task in dict.fromkeys(run.task for run in self.runs):
                if task not in self._manager.all_tasks:
                    hint = nearest(task, [*SUITES, *self._manager.all_tasks])
                    hint = hint if len(hint) < 200 else "lm-eval lists its tasks with `lm-eval --tasks list`"
                    raise UserError(f"there is no task or suite '{task}'; {hint}")
                try:
                    loaded = get_task_dict([task], self._manager)
                except Exception as error:  # data sets raise many kinds: no network, no such file, no such field
                    reason = " ".join(str(error).split())[:200] or type(error).__name__
                    raise UserError(f"the task '{task}' can't be loaded: {reason}") from None
                for part in _parts(loaded):
                    if getattr(part, "UNSAFE_CODE", False):
                        raise UserError(f"the task '{task}' runs code that the model wrote: use lm-eval's own command")
                    if part.OUTPUT_TYPE == "generate_until" and not generate:
                        raise UserError(
                            f"the task '{task}' generates text, which can't be done during training: evaluate the "
                            "exported model on it"
                        )

    @property
    def _manager(self) -> TaskManager:
        return task_manager(self.config.include_path)

    def run(self, lm: HFLM) -> TaskResults | None:
        """Run all tasks; the global random state is restored afterwards.

        Returns:
            The results on the first rank, None on other ranks.
        """
        ordered = sorted(self.runs, key=lambda run: -1 if run.shots is None else run.shots)
        found = {
            shots: self._run_at(shots, [run.task for run in runs], lm)
            for shots, runs in groupby(ordered, key=lambda run: run.shots)
        }
        if lm.rank:
            return None
        results = TaskResults()
        times = Counter(task for one in found.values() for task in one["results"])  # includes the members of groups
        for shots, one in found.items():
            for task, values in one["results"].items():
                name = f"{task}@{shots}" if times[task] > 1 else task
                results.tasks[name] = _metrics(values) | {"num_fewshot": one["n-shot"].get(task, shots)}
                log.info("%s: %s", name, _shown(results.tasks[name]))
                if task in one["samples"]:
                    results.samples[name] = [_with_option_tokens(sample, lm) for sample in one["samples"][task]]
        for suite in [name for name in self.config.names if name in SUITES]:
            results.averages[suite] = self._average(suite, results.tasks)
        return results

    def _run_at(self, shots: int | None, tasks: list[str], lm: HFLM) -> dict[str, Any]:
        """The results of lm-eval for some tasks; empty on all ranks except the first."""
        if not lm.rank:
            log.info("running %s at %s shots", ", ".join(tasks), "their own" if shots is None else shots)
        with quiet(), _random_state_kept(), _progress_shown():
            try:
                return (
                    lm_eval.simple_evaluate(
                        lm, tasks=tasks, num_fewshot=shots, limit=self.config.limit, task_manager=self._manager
                    )
                    or {}
                )
            except ValueError as error:
                if "larger than population" not in str(error):
                    raise
                raise UserError(f"a task has fewer examples than the {shots} shots asked for") from None

    def _average(self, suite: str, found: Mapping[str, Mapping[str, Any]]) -> float:
        values = []
        for run in expand([suite], self.config.num_fewshot):
            metrics = found.get(f"{run.task}@{run.shots}") or found[run.task]
            values.append(next(v for name, v in metrics.items() if name.partition(",")[0] == run.metric))
        return float(np.mean(values))


class EvaluatedModel(HFLM):
    """A model of lm-eval that refuses texts with tokens outside its vocabulary."""

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """Tokenise a text.

        Raises:
            UserError: a token is outside the model's vocabulary.
        """
        tokens: list[int] = super().tok_encode(string, *args, **kwargs)
        check_vocabulary(max(tokens, default=0), self.config, f"the text '{string[:40]}'")
        return tokens

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Tokenise several texts; returns token ids and the mask of tokens that are not padding; see ``tok_encode``."""
        tokens, mask = super().tok_batch_encode(strings, *args, **kwargs)
        check_vocabulary(int((tokens * mask).max()), self.config, f"the text '{strings[0][:40]}'")
        return tokens, mask


def language_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int | str) -> HFLM:
    """Wrap a loaded model as a model of lm-eval.

    Args:
        model: any causal LM.
        tokenizer: tokenizer of the model.
        batch_size: number of requests per forward pass; ``auto`` = the largest number that fits into memory.
    """
    with quiet():
        return EvaluatedModel(model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")


def save_samples(samples: Mapping[str, Sequence[Mapping[str, Any]]], folder: Path) -> None:
    """Write one ``samples_TASK.jsonl`` for each task, with lm-eval's fields and ``option_tokens``."""
    for task, lines in samples.items():
        with (folder / f"samples_{task.replace('/', '_')}.jsonl").open("w", encoding="utf-8") as file:
            for line in lines:
                arguments = {
                    f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(argument)}
                    for i, argument in enumerate(line["arguments"])
                }
                dumped = json.dumps(
                    {**line, "arguments": arguments, "target": str(line["target"])},
                    default=handle_non_serializable,
                    ensure_ascii=False,
                )
                file.write(dumped + "\n")


def _functions_in(folder: Path) -> list[str]:
    """The functions that a folder's task files name, as FILE: MODULE.FUNCTION."""
    return [
        f"{path.relative_to(folder)}: {name}"
        for path in sorted(folder.rglob("*.yaml"))
        for name in dict.fromkeys(_FUNCTION.findall(path.read_text(encoding="utf-8", errors="replace")))
    ]


def _parts(loaded: Mapping[Any, Any]) -> Iterator[Any]:
    """Yield the tasks in what lm-eval loads, where groups contain tasks and further groups."""
    for inner in loaded.values():
        if isinstance(inner, Mapping):
            yield from _parts(inner)
        else:
            yield inner


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename ``acc,none`` to ``acc``; the metric of another filter keeps its name (``exact_match,strict-match``)."""
    return {
        name.removesuffix(",none"): value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "sample_len"
    }


def _shown(metrics: Mapping[str, Any]) -> str:
    """A task's metrics without standard errors, as one line."""
    named = {name: value for name, value in metrics.items() if isinstance(value, float) and "stderr" not in name}
    return ", ".join(f"{name} {value:.4f}" for name, value in named.items())


def _with_option_tokens(sample: dict[str, Any], lm: HFLM) -> dict[str, Any]:
    """Add the number of tokens of each option of a multiple-choice question, which stability needs."""
    arguments = sample["arguments"]
    if len(arguments) < 2 or not all(len(a) == 2 and isinstance(a[1], str) for a in arguments):
        return sample
    counts = [len(lm._encode_pair(context, option)[1]) for context, option in arguments]
    return {**sample, "option_tokens": counts}


@contextmanager
def quiet() -> Iterator[None]:
    """Hide lm-eval's log except errors, and redirect its prints to standard error, because stdout is for results."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(before)


@contextmanager
def _progress_shown() -> Iterator[None]:
    """Show the requests to the model as ``Progress``, in the place of lm-eval's bars."""

    def requests(
        items: Any = None, *, total: int | None = None, desc: str = "texts", disable: bool = False
    ) -> Progress:
        name = desc.removeprefix("Running ").removesuffix(" requests")
        return Progress(items, desc=name, total=total, unit="requests", disable=disable)

    before, huggingface.tqdm = huggingface.tqdm, requests
    try:
        yield
    finally:
        huggingface.tqdm = before


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restore the global random state afterwards: lm-eval seeds every generator, which must not affect training."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
