"""How weights of domains follow their losses (dynamic batch loading: Sheared-LLaMA, arXiv:2310.06694, section 2.2)."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from llmprune.data.mixing import PPM
from llmprune.utils.errors import UserError
from llmprune.utils.files import read_json
from llmprune.utils.registry import Registry
from llmprune.utils.settings import check_settings, limited

TINY = 1e-100  # a weight below it is none

UPDATES: "Registry[Update]" = Registry("updates", "update of domain weights")
"""Updates by name."""


@dataclass
class DynamicLoadingConfig:
    """Weights of domains that change after every evaluation.

    Attributes:
        update: ``doremi``, ``bandit``, ``schedule`` or ``constant``.
        references: the loss (nats per token) that each domain is expected to come down to, by name, or the file that
            ``llmprune references`` wrote; ``doremi`` and ``bandit`` give weight to domains that are far above theirs.
        eta: step of ``doremi`` (no unit).
        smoothing: share that is spread evenly over all domains at each update.
        clamp: a domain below its reference counts as at it (as in the paper; not in its code).
        schedule: for ``schedule``: weights at shares of the run, straight lines between them:
            [{at: 0, weights: {a: 0.5, b: 0.5}}, {at: 1, weights: {b: 1}}].
        floor: least weight of each domain; a number for all, or by name.
        ceiling: greatest weight of each domain, alike.
        update_delay: batches from an evaluation to the first with new weights; at least workers × prefetch, so that
            none of them is loaded already.
    """

    update: str = "doremi"
    references: Any = None
    eta: float = limited(1.0, least=0)
    smoothing: float = limited(1e-4, least=0, most=1)
    clamp: bool = True
    schedule: list[dict[str, Any]] = field(default_factory=list)
    floor: Any = 0.0
    ceiling: Any = 1.0
    update_delay: int = limited(8, least=0)


@dataclass(frozen=True)
class Measured:
    """What an update may look at; all sequences are by domain, of those that are drawn.

    Attributes:
        weights: now in force; they sum to one.
        excess: loss above the reference, nats per token; NaN where that is unknown.
        progress: share of the run that is done.
    """

    weights: Sequence[float]
    excess: Sequence[float]
    progress: float


Update = Callable[[Measured, DynamicLoadingConfig, Sequence[str]], list[float]]


@UPDATES.register("doremi")
def doremi(measured: Measured, config: DynamicLoadingConfig, domains: Sequence[str]) -> list[float]:
    """Weights grow by the factor exp(eta · excess loss)."""
    logs = [math.log(w) + config.eta * e for w, e in zip(measured.weights, measured.excess, strict=True)]
    return _smoothed(_softmax(logs), config.smoothing)


@UPDATES.register("bandit")
def bandit(measured: Measured, config: DynamicLoadingConfig, domains: Sequence[str]) -> list[float]:
    """Softmax of weight plus excess loss."""
    logs = [w + e for w, e in zip(measured.weights, measured.excess, strict=True)]
    return _smoothed(_softmax(logs), config.smoothing)


@UPDATES.register("constant")
def constant(measured: Measured, config: DynamicLoadingConfig, domains: Sequence[str]) -> list[float]:
    """Weights stay as they are."""
    return list(measured.weights)


@UPDATES.register("schedule")
def schedule(measured: Measured, config: DynamicLoadingConfig, domains: Sequence[str]) -> list[float]:
    """Weights go along given points."""
    points = [(float(point["at"]), _shares(point["weights"], domains)) for point in config.schedule]
    progress = min(max(measured.progress, points[0][0]), points[-1][0])
    for (start, first), (end, last) in pairwise(points):
        if progress <= end:
            share = (progress - start) / (end - start)
            return [(1 - share) * a + share * b for a, b in zip(first, last, strict=True)]
    return points[-1][1]


NEEDS_LOSSES = ("doremi", "bandit")


def new_weights(
    measured: Measured, config: DynamicLoadingConfig, domains: Sequence[str], held: Collection[str] = ()
) -> list[float] | None:
    """The weights after an evaluation, within their bounds; None if they have to stay: a loss or a weight is no number.

    Domains that are ``held``, and those whose weight is zero, keep it and the others share the rest; with ``schedule``
    all domains go along the schedule. The weights sum to one.
    """
    free = list(range(len(domains)))
    if config.update != "schedule":
        free = [i for i in free if measured.weights[i] and domains[i] not in held]
    excess = [measured.excess[i] for i in free]
    if config.update in NEEDS_LOSSES and not all(map(math.isfinite, excess)):
        return None
    names = [domains[i] for i in free]
    whole = sum(measured.weights[i] for i in free)
    seen = Measured(
        [measured.weights[i] / whole for i in free] if whole else [],
        [max(e, 0.0) for e in excess] if config.clamp else excess,
        measured.progress,
    )
    share = 1.0 if config.update == "schedule" else whole
    floor, ceiling = _bounds(config, names)
    if config.update != "schedule":  # a domain of weight zero would be out for good
        floor = [min(max(low, 1 / PPM), high) for low, high in zip(floor, ceiling, strict=True)]
    wanted = UPDATES[config.update](seen, config, names)
    if not all(map(math.isfinite, wanted)):
        return None
    found = bounded(wanted, [low / share for low in floor], [high / share for high in ceiling])
    weights = list(measured.weights)
    for i, weight in zip(free, found, strict=True):
        weights[i] = weight * share
    return weights


def first_weights(config: DynamicLoadingConfig, domains: Sequence[str]) -> dict[str, float] | None:
    """The weights that a run begins with, if the update says so."""
    if config.update != "schedule":
        return None
    unknown = [math.nan] * len(domains)
    found = new_weights(Measured([1 / len(domains)] * len(domains), unknown, 0.0), config, domains)
    assert found is not None
    return dict(zip(domains, drawable(found), strict=True))


def bounded(weights: Sequence[float], floor: Sequence[float], ceiling: Sequence[float]) -> list[float]:
    """Shares in proportion to ``weights`` where their bounds allow it; they sum to one.

    What is left when all that have a weight are at their ceilings goes evenly to those that have none.

    Args:
        weights: not negative.
        floor: least shares; they sum to one at most.
        ceiling: greatest shares; they sum to one at least.
    """
    bounds = list(zip(floor, ceiling, strict=True))
    weights = [weight if weight > TINY else 0.0 for weight in weights]
    if sum(high if weight else low for weight, (low, high) in zip(weights, bounds, strict=True)) < 1:
        weights = [math.inf if weight else 1.0 for weight in weights]

    def shares(scale: float) -> list[float]:
        return [min(max(scale * w, lo), hi) for w, (lo, hi) in zip(weights, bounds, strict=True)]

    low, high = 0.0, 1 / TINY
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if sum(shares(middle)) < 1 else (low, middle)
    found = shares(high)
    return [share / sum(found) for share in found]


def read_references(references: Any) -> dict[str, float] | None:
    """Reference losses by domain, from wherever the config names them.

    Raises:
        UserError: the file holds none.
    """
    if references is None or isinstance(references, Mapping):
        return None if references is None else dict(references)
    if not isinstance(references, str):
        raise UserError(
            "dynamic_loading.references must be losses by domain, or the file that `llmprune references` wrote; got "
            f"'{references}'"
        )
    found = read_json(references)
    if not isinstance(found, dict) or not isinstance(found.get("references"), dict):
        raise UserError(f"{references} holds no reference losses: make it with `llmprune references`")
    return dict(found["references"])


def check_updates(
    config: DynamicLoadingConfig, domains: Sequence[str], drawn: Mapping[str, float], evaluated: Sequence[str]
) -> None:
    """Refuse settings that can't work, before anything is trained.

    Args:
        config: the settings.
        domains: all.
        drawn: those whose weight is not zero at the start, with these weights; they sum to one.
        evaluated: those that have evaluation samples; the others' weights are held where losses decide.

    Raises:
        UserError: what is wrong.
    """
    UPDATES[config.update]
    check_settings(config, "dynamic_loading")
    _check_by_domain(config, domains)
    free, share = _changing(config, domains, drawn, evaluated)
    floor, ceiling = _bounds(config, free)
    if any(not 0 <= lo <= hi <= 1 for lo, hi in zip(floor, ceiling, strict=True)):
        raise UserError("every domain needs 0 ≤ dynamic_loading.floor ≤ dynamic_loading.ceiling ≤ 1")
    if sum(floor) > share + 1e-9 or sum(ceiling) < share - 1e-9:
        raise UserError(
            f"dynamic_loading: the floors of the domains that change must sum to at most {share:g}, their ceilings to "
            f"at least {share:g}"
        )
    if config.update == "schedule":
        _check_schedule(config, domains, floor, ceiling)
    if config.update in NEEDS_LOSSES:
        _check_references(config, free)


def _check_by_domain(config: DynamicLoadingConfig, domains: Sequence[str]) -> None:
    """Refuse settings by domain that name others, or are no numbers."""
    for name, named in (("references", config.references), ("floor", config.floor), ("ceiling", config.ceiling)):
        if isinstance(named, Mapping):
            if unknown := sorted(set(named) - set(domains)):
                raise UserError(
                    f"dynamic_loading.{name} names '{unknown[0]}', which the data do not have: `llmprune references` "
                    "measures those of other data"
                    if name == "references"
                    else f"dynamic_loading.{name} names '{unknown[0]}', which the data do not have"
                )
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in named.values()):
                raise UserError(f"dynamic_loading.{name} must hold numbers")
        elif name != "references" and not isinstance(named, int | float):
            raise UserError(f"dynamic_loading.{name} must be a number, or numbers by domain; got '{named}'")


def _changing(
    config: DynamicLoadingConfig, domains: Sequence[str], drawn: Mapping[str, float], evaluated: Sequence[str]
) -> tuple[list[str], float]:
    """The domains whose weights change, and the share of all that they have together.

    Raises:
        UserError: losses decide, and fewer than two have one.
    """
    if config.update == "schedule":
        return list(domains), 1.0
    if config.update not in NEEDS_LOSSES:
        return list(drawn), 1.0
    measured = set(evaluated)
    free = [domain for domain in drawn if domain in measured]
    lacking, remedy = "that are drawn from", "give them weights"
    if len(drawn) > 1:
        lacking, remedy = "with evaluation samples", "prepare the data with a larger --eval-fraction"
    if len(free) < 2:
        raise UserError(
            f"dynamic_loading.update={config.update} needs two domains {lacking}: {remedy}, or take "
            "dynamic_loading=null"
        )
    return free, sum(drawn[domain] for domain in free)


def _check_references(config: DynamicLoadingConfig, domains: Sequence[str]) -> None:
    if not config.references:
        raise UserError(
            f"dynamic_loading.update={config.update} needs dynamic_loading.references: the loss that each domain "
            "is expected to come down to"
        )
    for domain in domains:
        if domain not in config.references:
            raise UserError(f"dynamic_loading.references has no loss for the domain '{domain}'")


def _check_schedule(
    config: DynamicLoadingConfig, domains: Sequence[str], floor: Sequence[float], ceiling: Sequence[float]
) -> None:
    try:
        places = [float(point["at"]) for point in config.schedule]
        points = [_shares(point["weights"], domains) for point in config.schedule]
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise UserError(
            f"dynamic_loading.schedule must be points such as {{at: 0.5, weights: {{{domains[0]}: 1}}}}: {error}"
        ) from None
    if not places or places != sorted(set(places)) or not 0 <= places[0] <= places[-1] <= 1:
        raise UserError("dynamic_loading.schedule needs points whose 'at' rises from 0 to 1")
    if not all(math.isfinite(sum(point)) for point in points):
        raise UserError("dynamic_loading.schedule: the weights of a point must be numbers, not all zero")
    for place, point in zip(places, points, strict=True):
        for domain, weight, low, high in zip(domains, point, floor, ceiling, strict=True):
            if not low - 1e-9 <= weight <= high + 1e-9:
                raise UserError(
                    f"dynamic_loading.schedule gives '{domain}' {weight:g} at {place:g}, but its floor is {low:g} and "
                    f"its ceiling {high:g}"
                )


def _shares(weights: Mapping[str, float], domains: Sequence[str]) -> list[float]:
    if unknown := sorted(set(weights) - set(domains)):
        raise ValueError(f"there is no domain '{unknown[0]}'")
    values = [float(weights.get(domain, 0.0)) for domain in domains]
    if any(value < 0 for value in values):
        raise ValueError("a weight is negative")
    return [value / sum(values) for value in values]


def _bounds(config: DynamicLoadingConfig, domains: Sequence[str]) -> tuple[list[float], list[float]]:
    floor, ceiling = config.floor, config.ceiling
    return (
        [float(floor.get(d, 0.0) if isinstance(floor, Mapping) else floor) for d in domains],
        [float(ceiling.get(d, 1.0) if isinstance(ceiling, Mapping) else ceiling) for d in domains],
    )


def _softmax(logs: Sequence[float]) -> list[float]:
    largest = max(logs)
    powers = [math.exp(value - largest) for value in logs]
    return [power / sum(powers) for power in powers]


def _smoothed(weights: Sequence[float], share: float) -> list[float]:
    return [(1 - share) * weight + share / len(weights) for weight in weights]


def drawable(weights: Sequence[float]) -> list[float]:
    """Weights of which none is too small ever to be drawn, unless it is zero."""
    return [max(weight, 1 / PPM) if weight else 0.0 for weight in weights]
