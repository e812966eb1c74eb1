"""Reference losses of domains: measured on the source model, or predicted by the scaling law of its family."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from llmprune.data.format import tokenizer_fingerprint
from llmprune.data.prepared import PreparedData
from llmprune.evaluation.losses import evaluate_losses
from llmprune.models.loaded import find_model
from llmprune.models.loading import count_parameters
from llmprune.models.placement import Placement
from llmprune.utils.errors import UserError
from llmprune.utils.progress import Progress

log = logging.getLogger(__name__)

SCHEMA = 1
EXPONENTS = np.geomspace(1e-3, 3.0, 200)  # grid of exponents for the fit


@dataclass(frozen=True)
class ScalingLaw:
    """loss = a · N^(−b) + c, N the number of parameters.

    Attributes:
        a, b, c: coefficients of the curve.
        rmse: root-mean-square error of the fitted losses, nats per token; None if the curve passes through all of them
            in any case (three models), so that the quality of the fit is unknown.
    """

    a: float
    b: float
    c: float
    rmse: float | None

    def at(self, parameters: float) -> float:
        """The predicted loss, in nats per token, of a model with this number of parameters."""
        return float(self.a * parameters**-self.b + self.c)


def fit_scaling_law(parameters: Sequence[float], losses: Sequence[float]) -> ScalingLaw:
    """Fit a scaling law to the losses of a family's models, by least squares.

    For a given exponent, the two other coefficients are the solution of a linear problem; the exponent is searched.

    Args:
        parameters: numbers of parameters of models, at least three different ones.
        losses: loss of each model, in nats per token.

    Raises:
        UserError: there are too few sizes, or losses do not decrease with the size.
    """
    _check_sizes(parameters)
    sizes, wanted = np.asarray(parameters, float), np.asarray(losses, float)
    unit = sizes.min()

    def solve(exponent: float) -> tuple[float, float, float]:
        matrix = np.stack([(sizes / unit) ** -exponent, np.ones_like(sizes)], 1)
        (a, c), *_ = np.linalg.lstsq(matrix, wanted, rcond=None)
        return float(a), float(c), float(np.sum((matrix @ [a, c] - wanted) ** 2))

    start = int(np.argmin([solve(b)[2] for b in EXPONENTS]))
    around = EXPONENTS[max(start - 1, 0)], EXPONENTS[min(start + 1, len(EXPONENTS) - 1)]
    found = minimize_scalar(lambda b: solve(b)[2], bounds=around, method="bounded", options={"xatol": 1e-12})
    a, c, squares = solve(float(found.x))
    if a <= 0:
        raise UserError("the losses do not fall with the number of parameters: no scaling law fits them")
    rmse = None if len(losses) == 3 else float(np.sqrt(squares / len(losses)))
    return ScalingLaw(a * unit ** float(found.x), float(found.x), c, rmse)


def _check_sizes(parameters: Sequence[float]) -> None:
    if len(set(parameters)) < 3:
        raise UserError(f"a scaling law needs models of three sizes at least; there are {len(set(parameters))}")


def references(
    models: Sequence[str],
    data: PreparedData,
    placement: Placement,
    *,
    size: float | None = None,
    samples_per_domain: int | None = None,
    batch_size: int = 8,
    boundaries: bool | None = None,
) -> dict[str, Any]:
    """Compute reference losses of every domain of prepared data.

    Args:
        models: only the source model; or at least three models of a family, for their scaling law.
        data: prepared data.
        placement: device and dtype of the models.
        size: number of parameters of the model that the references are for, with several models; None with one model.
        samples_per_domain: largest number of samples per domain; None = all.
        batch_size: number of samples per forward pass.
        boundaries: whether attention restarts at each document; None = only for conversations.

    Returns:
        The contents of references.json: ``references`` by domain, the results of each model, and the fits.

    Raises:
        UserError: a model's tokenizer did not make the data, or there are too few models for a fit.
    """
    if (len(models) > 1) != (size is not None):
        raise UserError("give one model, whose losses are the references, or several with --size, for their law")
    if size is not None and not 0 < size < math.inf:
        raise UserError(f"--size {size:g} is no number of parameters")
    manifest = data.manifest
    found = [find_model(name, placement) for name in models]
    for one in found:
        if tokenizer_fingerprint(one.tokenizer) != manifest.tokenizer:
            raise UserError(f"the tokenizer of {one.name} did not make the data in {data.location}")
        if one.limit is not None and manifest.sequence_length > one.limit:
            raise UserError(f"the data's samples have {manifest.sequence_length} tokens, {one.name} takes {one.limit}")
    if size is not None:  # this check needs no measurement
        _check_sizes([count_parameters(one.config) for one in found])
    measured: dict[str, dict[str, Any]] = {}
    for one in Progress(found, desc="references", unit="models", disable=len(found) < 2):
        loaded = one.open()
        log.info("measuring the losses of %s: %s parameters", one.name, f"{loaded.parameters:,}")
        losses = evaluate_losses(
            loaded.model, data, samples_per_domain=samples_per_domain, batch_size=batch_size, boundaries=boundaries
        )
        measured[one.name] = {"parameters": loaded.parameters, "losses": losses.domains}
    result: dict[str, Any] = {"schema": SCHEMA, "models": measured}
    if size is None:
        return {**result, "references": measured[models[0]]["losses"]}
    return {**result, **predict(measured, size)}


def predict(measured: Mapping[str, Mapping[str, Any]], size: float) -> dict[str, Any]:
    """Predict references for a model of ``size`` parameters from the losses of other models; see ``references``."""
    laws = {}
    sizes = [one["parameters"] for one in measured.values()]
    for domain in next(iter(measured.values()))["losses"]:
        try:
            laws[domain] = fit_scaling_law(sizes, [one["losses"][domain] for one in measured.values()])
        except UserError as error:
            raise UserError(f"{domain}: {error}") from None
    return {
        "size": size,
        "references": {domain: law.at(size) for domain, law in laws.items()},
        "laws": {domain: vars(law) for domain, law in laws.items()},
    }
