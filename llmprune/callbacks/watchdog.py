"""Ending a job that hangs, and naming the rank that all others wait for."""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from llmprune.utils.processes import ACTIVITY

BEAT = 5.0  # seconds between the reports of a rank, unless patience is short
GRACE = 30.0  # seconds that other ranks wait for the verdict of rank 0 before they decide themselves
_REPORT, _VERDICT = "llmprune/report", "llmprune/verdict"


class Watchdog(Callback):
    """Ends all ranks when there has been no progress for a while, and names the rank that causes it.

    Without it, a hung job ends with "timed out" of a collective on every rank except the one that hangs. Here a thread
    of each rank reports to the distributed store the number of events that the rank has passed and the time of its last
    activity. All ranks pass the same events, so the others wait for the rank that has passed the fewest events or that
    no longer reports. That rank prints the stack of each of its threads.
    """

    def __init__(self, patience: float) -> None:
        """Store the time limit.

        Args:
            patience: seconds without an event, a forward pass or another sign of activity on a rank.
        """
        self._patience, self._beat = patience, min(BEAT, patience / 4)
        self._rank, self._ranks = dist.get_global_rank(), dist.get_world_size()
        self._ended = threading.Event()
        self._events, self._at, self._reports = 0, "the start", 0
        self._thread: threading.Thread | None = None

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Record the progress of this rank."""
        ACTIVITY.note()
        self._events += 1
        self._at = f"{event.value} of batch {state.timestamp.batch.value}"
        if event == Event.INIT and self._ranks > 1:
            state.model.model.register_forward_pre_hook(lambda *_: ACTIVITY.note())  # long evaluations
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        if event == Event.FIT_END:
            self._ended.set()

    def close(self, state: State, logger: Logger) -> None:
        """Stop watching: what follows is not training."""
        self._ended.set()

    def _watch(self) -> None:
        try:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store: Any = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60))
            judged_by = self._patience + (0 if self._rank == 0 else GRACE)
            while not self._ended.wait(self._beat):
                self._report(store)
                if store.check([_VERDICT]):
                    self._leave(json.loads(store.get(_VERDICT)))
                if time.monotonic() - ACTIVITY.last > judged_by and (verdict := self._judge(store)) is not None:
                    print(f"error: {verdict['message']}", file=sys.stderr, flush=True)
                    store.set(_VERDICT, json.dumps(verdict))
        except (RuntimeError, OSError):  # the store has ended with rank 0: the launcher ends the job
            return

    def _report(self, store: Any) -> None:
        self._reports += 1
        idle = time.monotonic() - ACTIVITY.last
        where = {"events": self._events, "at": self._at, "idle": idle, "report": self._reports}
        whom = {"host": socket.gethostname(), "process": os.getpid()}
        store.set(f"{_REPORT}/{self._rank}", json.dumps({**where, **whom}))

    def _judge(self, store: Any) -> dict[str, Any] | None:
        """Find the ranks that cause a hang from the reports of all ranks; None = there is no hang."""
        first = self._reports_in(store)
        for _ in range(3):
            time.sleep(self._beat)
            self._report(store)
        return judge(first, self._reports_in(store), self._ranks, self._patience)

    def _reports_in(self, store: Any) -> dict[int, dict[str, Any]]:
        keys = {rank: f"{_REPORT}/{rank}" for rank in range(self._ranks)}
        return {rank: json.loads(store.get(key)) for rank, key in keys.items() if store.check([key])}

    def _leave(self, verdict: dict[str, Any]) -> None:
        if self._rank in verdict["ranks"]:
            print(f"rank {self._rank} stands here:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=2, all_threads=True)
        else:
            time.sleep(2 * self._beat)  # the launcher ends all ranks as soon as one has ended
        os._exit(1)


def judge(
    before: Mapping[int, Mapping[str, Any]], now: Mapping[int, Mapping[str, Any]], ranks: int, patience: float
) -> dict[str, Any] | None:
    """Find the ranks that a job without progress is waiting for.

    Args:
        before: last report of each rank, by rank.
        now: report of each rank a little later, by rank.
        ranks: number of ranks.
        patience: seconds without activity after which a rank counts as hung.

    Returns:
        {"ranks": ranks that the others wait for, "message": text of the error}; None if one of these ranks is active.
    """
    silent = [
        rank for rank in range(ranks) if rank not in now or now[rank]["report"] == before.get(rank, {}).get("report")
    ]
    if any(report["idle"] < patience for rank, report in now.items() if rank not in silent):
        return None
    idle = round(max((report["idle"] for report in now.values()), default=0))
    begin = f"nothing has moved for {idle} s: "
    goes_on = "; run.autoresume=true resumes from the last checkpoint"
    if silent:
        names = ", ".join(_name(rank, now.get(rank)) for rank in silent)
        return {"ranks": silent, "message": f"{begin}no word comes from {names}{goes_on}"}
    least = min(report["events"] for report in now.values())
    behind = [rank for rank, report in sorted(now.items()) if report["events"] == least]
    if len(behind) == ranks:
        where = now[0]["at"]
        return {"ranks": behind, "message": f"{begin}all ranks are at {where}, and none gets through{goes_on}"}
    names = ", ".join(f"{_name(rank, now[rank])}, which is at {now[rank]['at']}" for rank in behind)
    others = sorted({report["at"] for rank, report in now.items() if rank not in behind})
    waiting = " and ".join(others)
    return {"ranks": behind, "message": f"{begin}the ranks at {waiting} wait for {names}{goes_on}"}


def _name(rank: int, report: Mapping[str, Any] | None) -> str:
    where = "" if report is None else f" (process {report['process']} on {report['host']})"
    return f"rank {rank}{where}"
