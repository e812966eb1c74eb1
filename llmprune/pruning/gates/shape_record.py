"""The uniform shape chosen at the end of a run, in a file in the folder of its checkpoints."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json, write_json

_FILE = "shape.json"


def save_shape(
    checkpoints: Path, batch: int, rivals: Sequence[Mapping[str, int]], losses: Sequence[float], best: int
) -> None:
    """Write the chosen shape and the shapes that it was compared with.

    Args:
        checkpoints: folder of the checkpoints.
        batch: number of batches before the checkpoint that the shape was chosen for.
        rivals: number of gates of every row that stay, by kind, for each compared shape.
        losses: held-out loss of each compared shape under the gates.
        best: index of the chosen shape in ``rivals``.
    """
    compared = [{"counts": dict(counts), "loss": loss} for counts, loss in zip(rivals, losses, strict=True)]
    write_json(checkpoints / _FILE, {"schema": 1, "batch": batch, "counts": dict(rivals[best]), "compared": compared})


def is_chosen(checkpoints: Path, batch: int) -> bool:
    """Whether a shape was chosen for the checkpoint after ``batch`` batches."""
    path = checkpoints / _FILE
    found = read_json(path) if path.is_file() else None
    return isinstance(found, dict) and found.get("batch") == batch


def chosen_shape(checkpoints: Path, batch: int, sizes: Mapping[str, Sequence[int]]) -> dict[str, int] | None:
    """The number of gates that stay in every row, by kind, as chosen for a checkpoint; None if nothing was chosen.

    Args:
        checkpoints: folder of the checkpoints.
        batch: number of batches before the checkpoint.
        sizes: sizes of the gates' tensors, by kind.

    Raises:
        UserError: the file is damaged or of other gates.
    """
    path = checkpoints / _FILE
    if not path.is_file():
        return None
    found = read_json(path)
    try:
        if found["batch"] != batch:
            return None
        counts = {str(kind): int(count) for kind, count in found["counts"].items()}
        if counts.keys() != sizes.keys() or not all(0 < counts[kind] <= sizes[kind][-1] for kind in sizes):
            raise ValueError(f"the gates are of {', '.join(sizes)}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} does not fit the checkpoint ({type(error).__name__}: {error})") from None
    return counts
