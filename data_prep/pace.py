"""Logging the progress and the speed of a job."""

import logging
import time
from collections.abc import Iterable

from data_prep.packer import Packer

log = logging.getLogger(__name__)


class Pace:
    """Logs the share of all inputs that was read, the speed since the last log, and the counts of each domain."""

    def __init__(self, total: int, position: int) -> None:
        """Start the clock.

        Args:
            total: bytes of all inputs.
            position: bytes that have been read already.
        """
        self._total, self._time, self._position = total, time.monotonic(), position

    def log(self, position: int, packers: Iterable[Packer] = ()) -> None:
        """Log the progress.

        Args:
            position: bytes that have been read so far.
            packers: packers whose domains are logged.
        """
        now = time.monotonic()
        rate = (position - self._position) / max(now - self._time, 1e-9)
        log.info("%.1f of %.1f MB are read, at %.2f MB/s", position / 1e6, self._total / 1e6, rate / 1e6)
        for packer in packers:
            for domain, documents, samples in packer.progress():
                log.info("%s: %s documents, %s samples so far", domain, f"{documents:,}", f"{samples:,}")
        self._time, self._position = now, position
