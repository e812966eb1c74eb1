"""Monitoring of a process and its device."""

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
    """The utilisation in percent: of the GPU, or of all cores since the last call; None if the device has no report."""
    if device.type != "cuda":
        return psutil.cpu_percent()
    try:
        return float(torch.cuda.utilization(device))
    except (RuntimeError, ModuleNotFoundError):
        return None


def resident_bytes() -> int:
    """The resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


@dataclass
class Peak:
    """The peak memory of some work, in bytes.

    Attributes:
        added: bytes above the memory in use before, on the device; without a GPU, in this process.
        process: bytes of the whole process.
    """

    added: int = 0
    process: int = 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """While open, the memory is monitored; the figures are complete at the end."""
    on_gpu = device.type == "cuda"
    return_memory()
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


def return_memory() -> None:
    """Return freed memory to the system or the GPU, so that others can use it, and the next allocation is visible."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@dataclass(frozen=True)
class Sample:
    """The utilisation of the device at one time.

    Attributes:
        time_s: seconds since the watch began.
        doing: description of the work at that time.
        utilisation: utilisation of the device in percent.
        memory_bytes: bytes allocated on the GPU, or resident in this process.
    """

    time_s: float
    doing: str
    utilisation: float
    memory_bytes: int


class UtilisationWatch:
    """Records the utilisation of the device every half second."""

    def __init__(self, device: torch.device, interval: float = 0.5) -> None:
        """Create a watch of ``device``, with ``interval`` seconds between samples."""
        self.samples: list[Sample] = []
        self.doing = ""
        self._device, self._interval = device, interval

    @contextmanager
    def running(self) -> Iterator[None]:
        """Record samples while open; there are none if the device does not report its utilisation."""
        start = time.perf_counter()

        def look() -> None:
            if (busy := device_utilisation(self._device)) is not None:
                on_gpu = self._device.type == "cuda"
                memory = torch.cuda.memory_allocated(self._device) if on_gpu else resident_bytes()
                self.samples.append(Sample(time.perf_counter() - start, self.doing, busy, memory))

        device_utilisation(self._device)  # the first value for the cores is meaningless
        with _repeated(look, self._interval):
            yield


@contextmanager
def _repeated(work: Callable[[], None], interval: float) -> Iterator[None]:
    """While open, call ``work`` every ``interval`` seconds in a separate thread."""
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
