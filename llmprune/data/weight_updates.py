"""Updates of domain weights from losses (dynamic batch loading: Sheared-LLaMA, arXiv:2310.06694, section 2.2)."""

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

TINY = 1e-100  # weights below it count as zero

UPDATES: "Registry[Update]" = Registry("updates", "update of domain weights")
"""Updates by name."""


@dataclass
class DynamicLoadingConfig:
    """Domain weights that change after every evaluation.

    Attributes:
        update: rule of the update: ``doremi``, ``bandit``, ``schedule`` or ``constant``.
        references: reference loss (nats per token) that each domain is expected to reach, by name, or the path of a
            file that ``llmprune references`` wrote; ``doremi`` and ``bandit`` raise the weights of domains far above
            their references.
        eta: step size of ``doremi`` (no unit).
        smoothing: share of the weights that is spread evenly over all domains at each update.
        clamp: treat a domain whose loss is below its reference as if its loss were equal to it (as in the paper; not in
            its code).
        schedule: weights at points of the run, for ``schedule``; between points they change linearly: [{at: 0, weights:
            {a: 0.5, b: 0.5}}, {at: 1, weights: {b: 1}}].
        floor: lowest weight of each domain: one number for all domains, or numbers by name.
        ceiling: highest weight of each domain: one number for all domains, or numbers by name.
        update_delay: number of batches from an evaluation to the first batch with the new weights; at least workers ×
            prefetch, so that none of these batches is loaded already.
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
    """The measurements that an update reads; all sequences have one value per domain that is drawn from.

    Attributes:
        weights: current weights of the domains; they sum to one.
        excess: loss minus reference loss of each domain, nats per token; NaN if unknown.
        progress: share of the run that is done, 0 to 1.
    """

    weights: Sequence[float]
    excess: Sequence[float]
    progress: float


Update = Callable[[Measured, DynamicLoadingConfig, Sequence[str]], list[float]]


@UPDATES.register("doremi")
def doremi(measured: Measured, config: DynamicLoadingConfig, domains: Sequence[str]) -> list[float]:
    """Each weight is multiplied by exp(eta · excess loss)."""
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
    """Weights follow given points, linearly between them."""
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
    """The weights after an evaluation, within their bounds; None if a loss or a weight is not finite.

    With None the weights have to stay. Domains in ``held``, and domains of weight zero, keep their weights, and the
    others share the rest; with ``schedule`` all domains follow the schedule. The weights sum to one.
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
    if config.update != "schedule":  # a domain of weight zero would never be drawn again
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
    """The weights at the start of a run, if the update is a schedule; otherwise None."""
    if config.update != "schedule":
        return None
    unknown = [math.nan] * len(domains)
    found = new_weights(Measured([1 / len(domains)] * len(domains), unknown, 0.0), config, domains)
    assert found is not None
    return dict(zip(domains, drawable(found), strict=True))


def bounded(weights: Sequence[float], floor: Sequence[float], ceiling: Sequence[float]) -> list[float]:
    """Shares in proportion to ``weights`` where their bounds allow it; they sum to one.

    If all domains with a weight are at their ceilings, the remaining share is divided evenly among domains without one.

    Args:
        weights: weights of the domains, not negative.
        floor: lowest shares of the domains; they sum to one at most.
        ceiling: highest shares of the domains; they sum to one at least.
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
    """Reference losses by domain, from the config or from the file that it names.

    Raises:
        UserError: the file contains no reference losses.
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
    """Refuse settings that can't work, before any training.

    Args:
        config: settings of dynamic loading.
        domains: names of all domains.
        drawn: weights at the start of the domains that are drawn from (weight not zero), by name; they sum to one.
        evaluated: names of the domains with evaluation samples; the weights of other domains are held if losses decide.

    Raises:
        UserError: a setting can't work.
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
    """Refuse settings by domain that name unknown domains, or have values that are no numbers."""
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
    """The domains whose weights change, and the sum of their weights.

    Raises:
        UserError: losses decide, and fewer than two domains have one.
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
    """Weights raised to the smallest weight that can be drawn; zero stays zero."""
    return [max(weight, 1 / PPM) if weight else 0.0 for weight in weights]
