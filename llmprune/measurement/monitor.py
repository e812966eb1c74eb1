"""Watching a process and its device while it works."""

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch


def device_utilisation(device: torch.device) -> float | None:
    """How busy the device is, in percent: the GPU, or all cores since the last call; None if it does not report it."""
    if device.type != "cuda":
        return psutil.cpu_percent()
    try:
        return float(torch.cuda.utilization(device))
    except (RuntimeError, ModuleNotFoundError):
        return None


def resident_bytes() -> int:
    """Memory that this process occupies."""
    return int(psutil.Process().memory_info().rss)


@dataclass
class Peak:
    """Peak memory of some work, bytes.

    Attributes:
        added: above what was there before; on the device, which without a GPU is the machine.
        process: of the whole process.
    """

    added: int = 0
    process: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Watch the memory of the work inside; the figures are there when it ends."""
    on_gpu = device.type == "cuda"
    _return_free_memory()
    peak, before = Peak(), resident_bytes()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
    peak.process = before

    def look() -> None:
        peak.process = max(peak.process, resident_bytes())

    with _repeated(look, 0.002):
        yield peak
    look()
    peak.added = (torch.cuda.max_memory_allocated(device) - allocated) if on_gpu else peak.process - before


def _return_free_memory() -> None:
    """Give what was freed back to the system, so that what is taken next can be seen (glibc keeps it otherwise)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass(frozen=True)
class Sample:
    """How busy the device was.

    Attributes:
        time_s: since the watch began.
        doing: what was going on.
        utilisation: percent.
        memory_bytes: allocated on the GPU, or resident.
    """

    time_s: float
    doing: str
    utilisation: float
    memory_bytes: int


class UtilisationWatch:
    """Notes every half second how busy the device is."""

    def __init__(self, device: torch.device, interval: float = 0.5) -> None:
        """Watch ``device``."""
        self.samples: list[Sample] = []
        self.doing = ""
        self._device, self._interval = device, interval

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch while open; nothing is noted if the device does not report."""
        start = time.perf_counter()

        def look() -> None:
            if (busy := device_utilisation(self._device)) is not None:
                on_gpu = self._device.type == "cuda"
                memory = torch.cuda.memory_allocated(self._device) if on_gpu else resident_bytes()
                self.samples.append(Sample(time.perf_counter() - start, self.doing, busy, memory))

        device_utilisation(self._device)  # the first reading of the cores means nothing
        with _repeated(look, self._interval):
            yield


@contextmanager
def _repeated(work: Callable[[], None], interval: float) -> Iterator[None]:
    """Do ``work`` every ``interval`` seconds in a thread of its own."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(interval):
            work()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
