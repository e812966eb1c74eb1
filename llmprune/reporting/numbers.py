"""Numbers as a reader wants them: few digits, and no word for a number that is none."""

import math
from typing import Any

ABSENT = "—"
NO_NUMBER = "no number"


def shown(value: Any, digits: int = 4) -> str:
    """A number as text.

    >>> shown(134515008), shown(12.0449), shown(0.51239), shown(1234.56), shown(float("nan"))
    ('134,515,008', '12.04', '0.5124', '1,235', 'no number')

    Args:
        value: number; a whole number keeps all digits; None or NaN = the number could not be computed.
        digits: number of significant digits of other numbers.
    """
    if value is None or not math.isfinite(value):
        return NO_NUMBER
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -4 <= exponent < 9:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(digits - 1 - exponent, 0)}f}"


def memory(size: float) -> str:
    """An amount of memory in bytes as text.

    >>> memory(118_400_000), memory(13.42e9)
    ('118 MB', '13.4 GB')
    """
    return f"{shown(float(size) / 1e9, 3)} GB" if abs(size) >= 1e9 else f"{shown(float(size) / 1e6, 3)} MB"
