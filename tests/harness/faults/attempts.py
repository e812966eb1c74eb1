"""Doing a job in a process of its own, which something may happen to."""

import contextlib
import math
import multiprocessing
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from tests.harness.faults.jobs import JOBS

ROOT = Path(__file__).resolve().parents[3]
LIMIT = 120.0  # seconds for an attempt
TOLD = 2  # the exit code of what ended with one clear line


@dataclass(frozen=True)
class Fault:
    """What happens inside the process.

    Attributes:
        largest_file: bytes; writing further fails as a full disk would.
        nan_at: the batch whose loss is no number.
        clock: whether the wall clock jumps by up to a month, back and forth.
        remote: share of copies to another place that fail.
        seed: of all this.
    """

    largest_file: int | None = None
    nan_at: int | None = None
    clock: bool = False
    remote: float = 0.0
    seed: int = 0

    @contextlib.contextmanager
    def happens(self) -> Iterator[None]:
        """While open."""
        from llmprune.models.causal_lm import ComposerCausalLM
        from llmprune.utils import object_store as stores

        chance, now, copy = random.Random(self.seed), time.time, shutil.copyfile
        loss, passes = ComposerCausalLM.loss, iter(range(10**9))

        def jumping() -> float:
            return now() + chance.uniform(-1, 1) * 30 * 86400

        def failing(*args: Any, **kwargs: Any) -> Any:
            if chance.random() < self.remote:
                raise OSError("no route to host")
            return copy(*args, **kwargs)

        def spoilt(*args: Any, **kwargs: Any) -> Any:
            found = loss(*args, **kwargs)
            return found * math.nan if next(passes) // 2 == self.nan_at else found  # two microbatches

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(stores, "WAIT", 0.001))
            if self.clock:
                stack.enter_context(mock.patch("time.time", jumping))
            if self.remote:
                stack.enter_context(mock.patch("shutil.copyfile", failing))
            if self.nan_at is not None:
                stack.enter_context(mock.patch.object(ComposerCausalLM, "loss", spoilt))
            if self.largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest_file, self.largest_file))
            yield


class Attempts:
    """Starts processes that have imported everything already."""

    def __init__(self, inputs: Path) -> None:
        """Start none yet.

        Args:
            inputs: that ``jobs.prepare`` made.
        """
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path))
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self._inputs, self._context = inputs, multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.harness.faults.preloaded"])

    def start(self, job: str, folder: Path, *more: str, fault: Fault | None = None) -> BaseProcess:
        """Begin a job, or go on with it.

        Args:
            job: its kind.
            folder: of what it writes; its log is beside it.
            more: overrides.
            fault: what happens to it.
        """
        arguments = (job, folder, self._inputs, [*more], fault or Fault())
        process = self._context.Process(target=attempt, args=arguments)
        process.start()
        return process

    def finish(self, job: str, folder: Path, *more: str, fault: Fault | None = None) -> int | None:
        """Do a job, or go on with it, to its end; the exit code."""
        process = self.start(job, folder, *more, fault=fault)
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode

    def kill_after(self, seconds: float, job: str, folder: Path) -> None:
        """Begin a job, or go on with it, and kill it."""
        process = self.start(job, folder)
        process.join(seconds)
        process.kill()
        process.join()


def log_of(folder: Path) -> Path:
    """What the attempts at a job have printed."""
    return folder.with_name(f"{folder.name}.log")


def attempt(job: str, folder: Path, inputs: Path, more: list[str], fault: Fault) -> None:
    """Do a job in this process, with the exit codes of ``train.py``."""
    from llmprune.utils.errors import UserError, disk_error

    with log_of(folder).open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    try:
        with fault.happens():
            JOBS[job].run(folder, inputs, more)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(TOLD)
    except Exception as error:
        if (told := disk_error(error)) is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        sys.exit(TOLD)
