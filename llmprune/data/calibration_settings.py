"""The settings of calibration samples."""

from dataclasses import dataclass
from typing import Literal

from llmprune.utils.settings import limited


@dataclass
class CalibrationConfig:
    """Calibration samples.

    Attributes:
        path: a folder prepared by ``python -m data_prep tokenize`` (its training split is used), or text, Markdown or
            JSON lines (a file or a folder, plain, .gz or .zst).
        samples: how many.
        length: tokens of each.
        bos: put a BOS before every sample (``each``), before the first one (``first``) or nowhere (``none``); it counts
            as one of the tokens.
        text_field: the field of a JSON record that holds the text.
        seed: of the choice among prepared samples.
    """

    path: str | None = None
    samples: int = limited(32, least=1)
    length: int = limited(128, least=8)
    bos: Literal["none", "first", "each"] = "none"
    text_field: str = "text"
    seed: int = limited(17, least=0)
