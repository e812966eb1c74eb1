"""scores.json: the scores of a model, and which model they belong to."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmprune.models.families import Shape, shape_from
from llmprune.utils.errors import UserError, nearest
from llmprune.utils.files import read_json, write_json


@dataclass(frozen=True)
class Scores:
    """The scores of one model by every criterion.

    Attributes:
        model: folder or hub name of the model.
        family: name of the model's family.
        fingerprint: SHA-256 over the model's weights.
        source: shape of the model.
        data: settings of the calibration samples; empty if none were needed.
        settings: settings of the criteria: reductions, seed, dtype.
        perplexity: perplexity of the whole model on the calibration samples; None = not measured.
        blocks: scores of blocks by criterion, one number per block, higher = keep.
        subblocks: scores of attentions or MLPs by criterion, one number per block, higher = keep.
        spans: scores of spans by criterion and length, one number per start.
        pairs: scores of pairs of blocks by criterion, [blocks][blocks].
        units: scores of units by criterion and unit (heads, kv_groups, channels, hidden or experts), [blocks][units],
            higher = keep.
    """

    model: str
    family: str
    fingerprint: str
    source: Shape
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    perplexity: float | None
    blocks: Mapping[str, list[float]] = field(default_factory=dict)
    subblocks: Mapping[str, list[float]] = field(default_factory=dict)
    spans: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)
    pairs: Mapping[str, list[list[float]]] = field(default_factory=dict)
    units: Mapping[str, Mapping[str, list[list[float]]]] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return self.source.layers

    def of_blocks(self, criterion: str) -> list[float]:
        """The scores of every block by a criterion.

        Raises:
            UserError: the criterion was not computed, or does not score blocks.
        """
        if criterion in self.spans:
            raise UserError(f"'{criterion}' scores spans: pass --span to remove one, or choose another criterion")
        if criterion in self.units:
            raise UserError(f"'{criterion}' scores units, not blocks: name it with --unit-criterion")
        return self._one(self.blocks, criterion, "blocks")

    def of_spans(self, criterion: str) -> Mapping[str, list[float]]:
        """The scores of every span by a criterion.

        Raises:
            UserError: the criterion was not computed, or does not score spans.
        """
        return self._one(self.spans, criterion, "spans")

    def of_units(self, criterion: str) -> Mapping[str, list[list[float]]]:
        """The scores of every unit of every block by a criterion, by unit.

        Raises:
            UserError: the criterion was not computed, or does not score units.
        """
        return self._one(self.units, criterion, "units")

    def _one(self, section: Mapping[str, Any], criterion: str, word: str) -> Any:
        if criterion not in section:
            raise UserError(
                f"the scores have no criterion '{criterion}' of {word}; {nearest(criterion, section)}"
                if section
                else f"the scores have no criterion of {word}: score again with '{criterion}'"
            )
        return section[criterion]

    def check_finite(self) -> None:
        """Check that all scores are finite.

        Raises:
            UserError: a criterion has a score that is not finite: the model's computation fails.
        """
        for section in ("blocks", "subblocks", "spans", "pairs", "units"):
            for name, values in getattr(self, section).items():
                if not all(math.isfinite(number) for number in _flat(values)):
                    raise UserError(
                        f"the criterion {name} came out as something that is no number: are the weights of "
                        f"{self.model} whole, and is the dtype wide enough for them?"
                    )

    def as_dict(self) -> dict[str, Any]:
        """The contents of scores.json."""
        return {"schema": 1, "num_blocks": self.layers, **asdict(self)}

    def save(self, path: Path | str) -> None:
        """Write the scores as JSON."""
        write_json(path, self.as_dict())

    @classmethod
    def load(cls, path: Path | str) -> "Scores":
        """Read scores from a file.

        Raises:
            UserError: the file is missing, damaged or cut short, or of another version.
        """
        values = read_json(path)
        try:
            schema, layers = values.pop("schema"), values.pop("num_blocks")
            if schema != 1:
                raise UserError(f"{path} has schema {schema}; this version reads 1")
            scores = cls(**{**values, "source": shape_from(values["source"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} holds no scores ({type(error).__name__}: {error}): score again") from None
        if layers != scores.layers or not _well_formed(scores):
            raise UserError(f"{path} is damaged: a criterion has too few, too many or impossible numbers; score again")
        return scores


def _flat(values: Any) -> Iterator[float]:
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, list):
        yield values
        return
    for item in values:
        yield from _flat(item)


def _well_formed(scores: Scores) -> bool:
    def numbers(values: Any, count: int) -> bool:
        return isinstance(values, list) and len(values) == count and all(_number(value) for value in values)

    layers, source = scores.layers, scores.source
    counts = {
        "heads": source.heads,
        "kv_groups": source.kv_heads,
        "channels": source.intermediate,
        "hidden": source.hidden,
        "experts": source.experts,
    }
    try:
        return (
            all(numbers(values, layers) for section in ("blocks", "subblocks") for values in _values(scores, section))
            and all(
                numbers(spans[str(n)], layers - n + 1)
                for spans in _values(scores, "spans")
                for n in range(1, layers + 1)
            )
            and all(
                len(rows) == layers and all(numbers(row, layers) for row in rows) for rows in _values(scores, "pairs")
            )
            and all(
                len(rows) == layers and all(numbers(row, counts[unit] or 0) for row in rows)
                for units in _values(scores, "units")
                for unit, rows in units.items()
            )
        )
    except (KeyError, TypeError, AttributeError):
        return False


def _values(scores: Scores, section: str) -> list[Any]:
    return list(getattr(scores, section).values())


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
