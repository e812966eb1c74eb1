"""Ratios of time, from interleaved runs, and the peak memory of some work."""

import gc
import resource
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Ratio:
    """One line of the table.

    Attributes:
        median: of the ratios of all pairs of runs (of memory: the one measured).
        p10: 10th percentile.
        p90: 90th percentile.
        bar: the most it may be.
        work: what was measured, in words.
        least: whether ``bar`` is the least that it may be instead.
    """

    median: float
    p10: float
    p90: float
    bar: float
    work: str
    least: bool = False

    @property
    def met(self) -> bool:
        """Whether the median keeps to the bar."""
        return self.median >= self.bar if self.least else self.median <= self.bar


def interleaved(measured: Callable[[], None], reference: Callable[[], None], runs: int, bar: float, work: str) -> Ratio:
    """Time the two in turn, after one warm-up of each."""
    ratios = []
    for number in range(runs + 1):
        seconds = []
        order = (measured, reference) if number % 2 else (reference, measured)
        for run in order:
            gc.collect()
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        took = dict(zip(order, seconds, strict=True))
        if number:
            ratios.append(took[measured] / took[reference])
    tenths = statistics.quantiles(ratios, n=10, method="inclusive")
    return Ratio(statistics.median(ratios), tenths[0], tenths[-1], bar, work)


def in_fresh_process(work: Callable[..., T], *arguments: Any) -> T:
    """Do ``work`` in a process of its own, whose peak memory is its own too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def peak_of(work: Callable[[], object]) -> int:
    """How many bytes more than before are resident at the peak of some work, mapped files included."""
    stop, peak = threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], _resident())

    before, watcher = _resident(), threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        stop.set()
        watcher.join()
    return peak[0] - before


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
