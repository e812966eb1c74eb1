"""The progress of long work: a bar on a terminal, a line now and then where standard error is a file."""

import os
import sys
from io import StringIO
from typing import Any

from tqdm import tqdm

from llmprune.utils.logs import tell

SECONDS = 30.0  # time without a line: before the first one, and between two


class Progress(tqdm):  # type: ignore[misc]
    """tqdm's bar on a terminal; elsewhere a line at most every 30 seconds, and one at the end of longer work.

    For example::

        scoring: 1,234 of 5,760 (21 %) block passes, 41.1 per second, 2 min left
        scoring: 5,760 of 5,760 (100 %) block passes, 41.1 per second, after 2 min

    A job's ``log.txt`` has these lines too. Of several ranks, only rank 0 shows its progress. ``update(n)`` adds n
    units of work; an iterable that is given adds one for each item. Everything else is as in tqdm.
    """

    def __init__(
        self,
        iterable: Any = None,
        *,
        desc: str,
        total: int | None = None,
        unit: str = "steps",
        initial: int = 0,
        disable: bool = False,
    ) -> None:
        """Start the clock.

        Args:
            iterable: items to iterate over; None = ``update`` is called.
            desc: what the work is.
            total: number of units of work; None = the length of ``iterable``, or unknown.
            unit: name of a unit, in the plural; "B" = bytes.
            initial: number of units that are done already.
            disable: whether nothing is shown.
        """
        self._drawn: bool = getattr(sys.stderr, "isatty", bool)()
        super().__init__(
            iterable,
            desc=desc,
            total=total,
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=unit == "B",
            initial=initial,
            disable=disable or os.environ.get("RANK", "0") != "0",
            file=sys.stderr if self._drawn else StringIO(),
            mininterval=0.1 if self._drawn else SECONDS,
            miniters=None if self._drawn else 0,  # look at the clock after every unit
            delay=0 if self._drawn else SECONDS,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, or write a line if one is due."""
        if self._drawn:
            return bool(super().display(msg, pos))
        ended = self.disable  # tqdm disables a bar before it draws it for the last time
        if ended or self.n != self.total:
            tell(self._line(self._time() - self.start_t, ended=ended))
        return True

    def _line(self, seconds: float, *, ended: bool) -> str:
        """The line after some seconds of work."""
        made = self.n - self.initial
        of = f" of {self._amount(self.total)} ({self.n / self.total:.0%})".replace("%", " %") if self.total else ""
        parts = [f"{self.desc}: {self._amount(self.n)}{of}{'' if self.unit == 'B' else self.unit}"]
        if made and seconds:
            rate = made / seconds
            parts.append(f"{self._amount(rate)} per second" if rate >= 1 else f"{duration(1 / rate)} each")
        if ended:
            parts.append(f"after {duration(seconds)}")
        elif made and self.total:
            parts.append(f"{duration(seconds / made * (self.total - self.n))} left")
        return ", ".join(parts)

    def _amount(self, number: float) -> str:
        """A number of units."""
        if self.unit == "B":
            return f"{number / 1e6:,.1f} MB"
        return f"{number:,.0f}" if number == int(number) or number >= 100 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """Return a duration in words.

    >>> duration(8100.0), duration(200.0), duration(7.4), duration(0.21)
    ('2 h 15 min', '3 min', '7 s', '0.21 s')
    """
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
    if seconds >= 100:
        return f"{round(seconds / 60)} min"
    return f"{seconds:.0f} s" if seconds >= 1 or seconds < 0.01 else f"{seconds:.2g} s"
