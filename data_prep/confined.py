"""Work on untrusted input in a separate process with limits of time and memory.

Jinja's sandbox protects files and the internals of Python from a chat template, but does not prevent endless loops and
endless output.
"""

import json
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from llmprune.utils.processes import end_with

SECONDS = 10.0  # time limit of one call
MEMORY = 1 << 30  # memory limit, in bytes beyond the process's size at its start


class Confined:
    """A function that is called in another process, which is ended at its limits; the next call restarts it.

    Arguments and results must be plain values, as in JSON.
    """

    def __init__(self, work: Callable[[Any], Any], name: str) -> None:
        """Confine the function ``work``, whose ``ValueError`` the caller gets; messages call it ``name``."""
        self._work, self._name = work, name
        self._process: BaseProcess | None = None
        self._line: Connection
        self._owner = os.getpid()

    def __call__(self, given: Any) -> Any:
        """Call the function with ``given`` and return its result.

        Raises:
            ValueError: the function has raised it, or has exceeded a limit.
        """
        asked = json.dumps(given).encode()
        if self._process is None:
            self._begin()
        try:
            self._line.send_bytes(asked)
            if not self._line.poll(SECONDS):
                raise ValueError(f"{self._name} takes longer than {SECONDS:g} seconds for it")
            answer = json.loads(self._line.recv_bytes())
        except (EOFError, OSError):
            self.close()
            raise ValueError(f"{self._name} ends its process over it") from None
        except BaseException:
            self.close()
            raise
        if "refusal" in answer:
            raise ValueError(answer["refusal"])
        return answer["result"]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._line.close()
            self._process = None

    def __del__(self) -> None:
        """End the process with the object, but not with a copy of it in a forked process."""
        if os.getpid() == self._owner:
            self.close()

    def _begin(self) -> None:
        context = multiprocessing.get_context("fork")
        self._line, other = context.Pipe()
        self._process = context.Process(target=self._serve, args=(other,), daemon=True)
        self._process.start()
        other.close()

    def _serve(self, line: Connection) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends this one
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        parent = multiprocessing.parent_process()
        assert parent is not None and parent.pid is not None
        end_with(parent.pid)
        _limit_memory()
        while True:
            line.send_bytes(json.dumps(self._answer(json.loads(line.recv_bytes()))).encode())

    def _answer(self, given: Any) -> dict[str, Any]:
        try:
            return {"result": self._work(given)}
        except ValueError as error:
            return {"refusal": str(error)}
        except MemoryError:
            return {"refusal": f"{self._name} needs more than {MEMORY >> 20} MiB of memory for it"}


def _limit_memory() -> None:
    """Limit further memory of this process to ``MEMORY`` bytes; no limit on a system without /proc."""
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        held = int(statistics.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
