"""The settings of calibration samples and of cached shards."""

from dataclasses import dataclass
from typing import Literal

from llmprune.utils.settings import limited

WORKERS = 64  # loader processes of a rank, at most


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


@dataclass
class CacheConfig:
    """Where each machine keeps shards of remote or compressed data.

    Attributes:
        folder: null = one in the system's temporary folder. Give a folder to read any data through a faster disk.
        limit: such as 200gb: the shards used longest ago make room, and those under way may exceed it. Null = none.
    """

    folder: str | None = None
    limit: str | None = None
