"""Commands in processes that are forked from one with everything imported: what a shell does, without the imports."""

import multiprocessing
import os
import runpy
import shlex
import sys
from pathlib import Path

_PRELOADED = [
    "composer",
    "datasets",
    "lm_eval",
    "peft",
    "streaming",
    "transformers",
    "llmprune.cli",
    "llmprune.training.trainer",
]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_PRELOADED)
_PROGRAMS = (["llmprune"], ["composer", "train.py"], ["python", "-m", "data_prep"])


def is_one_command(line: str) -> bool:
    """Whether a line of a shell is one command on one rank."""
    words = shlex.split(line)
    return any(words[: len(program)] == program for program in _PROGRAMS) and ";" not in words


def carry_out(line: str, folder: Path, log: Path, timeout: float) -> int | None:
    """Carry out a line of a shell in a folder; returns its exit code, None = it took too long."""
    process = _CONTEXT.Process(target=_main, args=(shlex.split(line), folder, log))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def _main(words: list[str], folder: Path, log: Path) -> None:
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(folder)
    if words[0] == "llmprune":
        from llmprune.cli import main

        sys.argv = words
        main()
    elif words[0] == "composer":
        sys.argv = words[1:]
        runpy.run_path(words[1], run_name="__main__")
    else:
        sys.argv = words[2:]
        runpy.run_module("data_prep", run_name="__main__", alter_sys=True)
