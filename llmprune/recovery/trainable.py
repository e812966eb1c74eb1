"""The weights that train, and when each of them starts to train."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from composer.core import Time, TimeUnit
from transformers import PreTrainedModel

from llmprune.models.parameters import parameter_names_of
from llmprune.utils.errors import UserError

UNITS = (TimeUnit.BATCH, TimeUnit.SAMPLE, TimeUnit.TOKEN, TimeUnit.DURATION)


@dataclass
class TrainableConfig:
    """The weights that train; all other weights stay bit for bit as they are.

    Attributes:
        parameters: names of what trains: output, final_norm, embedding, norms, block.N, last.K (the last K blocks),
            all, or the name of a parameter or module, such as model.layers.2.mlp, where * matches anything between two
            dots.
        later: names of what trains from later points of the run on, such as {0.5dur: [output, last.3]}.
    """

    parameters: list[str] = field(default_factory=list)
    later: dict[str, list[str]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ``UserError`` for settings that are wrong for any model."""
        if not self.parameters:
            raise UserError("trainable.parameters is empty: name what trains, such as [output, final_norm, last.3]")
        for point, parts in self.later.items():
            try:
                time = Time.from_timestring(point)
                if time.value <= 0 or time.unit not in UNITS:
                    raise ValueError
            except (ValueError, TypeError):
                raise UserError(
                    f"trainable.later: '{point}' is no point of a run in ba, sp, tok or dur: write 100ba or 0.5dur"
                ) from None
            if not parts:
                raise UserError(f"trainable.later: nothing trains from {point} on")
        if len({Time.from_timestring(point).unit for point in self.later}) > 1:
            raise UserError("trainable.later: give all points in the same unit")


@dataclass(frozen=True)
class Phase:
    """A part of a run in which the same parameters train.

    Attributes:
        start: time at which the phase begins.
        names: names of the parameters that train in the phase.
    """

    start: Time[int]
    names: frozenset[str]


def phases(model: PreTrainedModel, parts: Sequence[str], later: Mapping[str, Sequence[str]]) -> list[Phase]:
    """The phases of a run, in order of time.

    Raises:
        UserError: the model has no such part.
    """
    points = sorted((Time.from_timestring(point).value, point) for point in later)
    found = [Phase(Time(0, TimeUnit.BATCH), frozenset(parameter_names_of(model, parts)))]
    for _, point in points:
        names = frozenset(parameter_names_of(model, later[point]))
        found.append(Phase(Time.from_timestring(point), names))
    return found
