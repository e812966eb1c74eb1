"""The settings of calibration samples."""

from dataclasses import dataclass
from typing import Literal

from llmprune.utils.settings import limited


@dataclass
class CalibrationConfig:
    """The calibration samples.

    Attributes:
        path: folder prepared by ``python -m data_prep tokenize`` (its training split is used), or text, Markdown or
            JSON lines (a file or a folder, plain, .gz or .zst).
        samples: number of samples.
        length: number of tokens of each sample; null = 512, or fewer where the model takes fewer or prepared samples
            are shorter.
        bos: place of BOS tokens: before every sample (``each``), before the first sample (``first``) or nowhere
            (``none``); a BOS counts as one of the sample's tokens.
        text_field: name of the field of a JSON record that contains the text.
        seed: seed of the random choice among prepared samples.
    """

    path: str | None = None
    samples: int = limited(32, least=1)
    length: int | None = limited(None, least=8)
    bos: Literal["none", "first", "each"] = "none"
    text_field: str = "text"
    seed: int = limited(17, least=0)
