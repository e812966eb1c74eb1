"""Short labels of models, runs and files."""

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath


def short_names(names: Sequence[str]) -> list[str]:
    """The last part of every path or hub name, and as many parts before it as are needed to tell equal ones apart.

    >>> short_names(["runs/a/model", "runs/b/model", "org/base"])
    ['a/model', 'b/model', 'base']
    """
    parts = [PurePath(name).parts or (name,) for name in names]
    taken = [1] * len(parts)
    while True:
        labels = [str(PurePath(*part[-take:])) for part, take in zip(parts, taken, strict=True)]
        count = Counter(labels)
        longer = [i for i, label in enumerate(labels) if count[label] > 1 and taken[i] < len(parts[i])]
        if not longer:
            return labels
        for i in longer:
            taken[i] += 1
