"""One iteration-time model of several engines of a kind, and how fast each of them is beside the others.

Engine i takes f_i times as long as the common model says. Prior of log f_i: most engines of a kind differ by little,
N(0, τ²), and one in a hundred is anywhere, N(0, 1) (a throttled or shared GPU). τ² is estimated between the engines by
moments, with a prior of `_PRIOR_ENGINES` engines that differ by `_PRIOR_SPREAD`, and kept between two bounds. So a new
engine is taken to be like the others, a small difference is shrunk by within/(within + between) variance, and a
large one counts in full after a few dozen iterations.

Sources: weighted least squares with a multiplicative effect for each group; the moment estimator of the variance
between groups (DerSimonian and Laird 1986); the two-component prior of a mean (Mitchell and Beauchamp 1988).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.special import chdtri

from scheduler.estimation.intervals import CONFIDENCE, FALSE_ALARM
from scheduler.estimation.iteration_time_fit import MIN_RECORDS, TERMS, model_of
from scheduler.model.iteration_time import IterationTimeModel

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
MATTERS = math.log(1.05)
"""Engines within a factor of 1.05 are not told apart in words."""
GRID = 0.02
"""Own factors are rounded to whole multiples of this (log), so that engines of nearly one speed share a plan."""
_PRIOR_ENGINES, _PRIOR_SPREAD = 4.0, 0.02
_LEAST_SPREAD, _MOST_SPREAD = 0.002, 0.1
_ODD_SHARE, _ODD_SPREAD = 0.01, 1.0
_PRIOR_RECORDS, _MOST_RECORDS = 2.5, 1000.0
_SMALLEST_UNITS = np.array([1, 1, 1e-3, 1e-3, 1e-5])
_MOST_INFLATION = 20.0
"""Errors that a wrong shape makes are correlated too: they must not hide it."""
_LEAST_ERROR, _LARGEST = 0.002, 1e18
_FIRST_LOOK = math.log(2)
"""Engines beyond a factor of two are no part of the first common model."""
_ROUNDS = 4
_SHAPE_RECORDS, _SHAPE_PRIOR_RECORDS, _SHAPE_MATTERS = 100.0, 2.0, 0.03
"""Iterations before an engine gets coefficients of its own, and the mean relative difference of their predictions that
it takes."""


@dataclass(frozen=True, slots=True)
class Sums:
    """`TimeSums` of n engines: weight (n), features (n, 5, 5), product (n, 5), square (n). inflation: by how much the
    correlation of successive errors widens the variance of a mean (n)."""

    weight: Floats
    features: Floats
    product: Floats
    square: Floats
    inflation: Floats


@dataclass(frozen=True, slots=True)
class Speeds:
    """The comparison of n engines.

    common: the model of the usual ones. factors: posterior means of f; low, high: their intervals. apart: the interval
    excludes every factor within 1.05, so the engine is named. usual: engines from which the common model is learned.
    own: coefficients of engines that differ by more than a factor (index: model).
    error_std: relative error of an iteration under each engine's model. spread: τ.
    """

    common: IterationTimeModel
    factors: Floats
    low: Floats
    high: Floats
    apart: Flags
    usual: Flags
    own: dict[int, IterationTimeModel]
    error_std: Floats
    spread: float

    def steps(self, place: int) -> int:
        """The factor of an engine, in steps of `GRID`; 0: the common model holds."""
        return round(math.log(self.factors[place]) / GRID)

    def model(self, place: int) -> IterationTimeModel:
        """The model that an engine is planned with."""
        return self.own.get(place) or self.common.faster(math.exp(-GRID * self.steps(place)))


def compare(sums: Sums, prior: IterationTimeModel) -> Speeds:
    """Compare engines. prior: a model whose proportions count as much as `_PRIOR_RECORDS` iterations."""
    known = _sound(sums)
    sums = Sums(
        np.where(known, sums.weight, 0.0), np.where(known[:, None, None], sums.features, 0.0),
        np.where(known[:, None], sums.product, 0.0), np.where(known, sums.square, 0.0), sums.inflation,
    )
    start = np.array([getattr(prior, term) for term in TERMS])
    factors = _factors(sums, start, known)
    scale = _usual_factor(factors, sums.weight, known)
    start, factors = start * scale, np.where(known, factors / scale, 1.0)
    common, usual, spread2 = start, known & (np.abs(np.log(factors)) <= _FIRST_LOOK), _PRIOR_SPREAD**2
    for _ in range(_ROUNDS):
        common = _fitted(sums, factors, usual, start)
        factors = _factors(sums, common, known)
        scale = _usual_factor(factors, sums.weight, known)
        common, factors = common * scale, np.where(known, factors / scale, 1.0)
        variance = _variance(sums, common, factors, known)
        logs = np.log(factors)
        usual = known & (np.abs(logs) <= MATTERS + 3 * np.sqrt(variance + spread2))
        spread2 = _spread2(logs[usual], variance[usual])
    posterior, spread = _posterior(logs, variance, spread2)
    half = math.sqrt(float(chdtri(1, 1 - CONFIDENCE))) * spread
    model = model_of(common) or prior
    own = _own_models(sums, common, factors, known)
    return Speeds(
        model, np.exp(posterior), np.exp(posterior - half), np.exp(posterior + half),
        known & (np.abs(posterior) - half > MATTERS), usual, own, np.sqrt(_error2(sums, common, factors, known)),
        math.sqrt(spread2),
    )


def _fitted(sums: Sums, factors: Floats, usual: Flags, start: Floats) -> Floats:
    """The coefficients, none negative: ridge regression towards `start` over the usual engines."""
    counted = np.einsum("i,nij,j->n", start, sums.features[usual], start)  # about the weight, whatever was reported
    weights = np.minimum(1.0, _MOST_RECORDS / np.maximum(counted, 1e-9))
    matrix = np.einsum("n,nij->ij", weights * factors[usual] ** 2, sums.features[usual])
    units = _units(start, matrix, float(weights @ sums.weight[usual]))
    ridge = np.diag(_PRIOR_RECORDS / units**2)
    matrix = matrix + ridge
    target = (weights * factors[usual]) @ sums.product[usual] + ridge @ start
    # Scaled, so that seconds and seconds per token are of one size.
    root = np.linalg.cholesky(matrix * np.outer(units, units))
    found = nnls(root.T, np.linalg.solve(root, target * units))[0] * units
    found[:2] = np.where(start[:2] > 0, np.maximum(found[:2], 1e-4 * start[:2]), found[:2])
    return np.asarray(found)


def _units(start: Floats, features: Floats, weight: Floats | float) -> Floats:
    """Plausible sizes of the coefficients: those of `start`, or what makes a third of an iteration; (…, 5)."""
    squares = np.diagonal(features, axis1=-2, axis2=-1) / np.maximum(np.asarray(weight)[..., None], 1e-9)
    part = np.where(squares > 0, 1 / (3 * np.sqrt(np.maximum(squares, 1e-30))), 0.0)
    smallest = _SMALLEST_UNITS * start[..., :2].max(axis=-1, keepdims=True)
    return np.asarray(np.maximum(np.maximum(start, smallest), part))


def _factors(sums: Sums, common: Floats, known: Flags) -> Floats:
    predicted = np.einsum("i,nij,j->n", common, sums.features, common)
    factors = np.divide(sums.product @ common, predicted, out=np.ones(len(known)), where=known & (predicted > 0))
    return np.asarray(np.clip(factors, 1e-3, 1e3))


def _sound(sums: Sums) -> Flags:
    """Engines with sums that real iterations can have."""
    small: Flags = np.all(np.abs(sums.features) < _LARGEST, axis=(1, 2)) & np.all(
        np.abs(sums.product) < _LARGEST, axis=1
    )
    features = np.where(small[:, None, None], sums.features, 0.0)
    diagonal = np.maximum(np.diagonal(features, axis1=1, axis2=2), 1e-30)
    scaled = features / np.sqrt(diagonal[:, :, None] * diagonal[:, None, :])
    finite = small & (np.abs(sums.square) < _LARGEST) & (np.abs(sums.weight) < _LARGEST)
    lowest = np.linalg.eigvalsh(scaled)[:, 0]
    return np.asarray(finite & (sums.weight >= 1) & (lowest > -1e-6) & (sums.square > 0))


def _usual_factor(factors: Floats, weight: Floats, known: Flags) -> float:
    """The median of the engines that have been measured, of two the faster one's."""
    enough = min(MIN_RECORDS, float(weight[known].max(initial=0.0)))
    measured = np.sort(factors[known & (weight >= enough)])
    return float(measured[(measured.size - 1) // 2]) if measured.size else 1.0


def _error2(sums: Sums, common: Floats, factors: Floats, known: Flags) -> Floats:
    """Mean square of the relative errors of each engine; few iterations are completed by those of all."""
    predicted = np.einsum("i,nij,j->n", common, sums.features, common)
    left = np.maximum(sums.square - 2 * factors * (sums.product @ common) + factors**2 * predicted, 0.0)
    left = np.where(known, left, 0.0)
    usual = float(np.median(left[known] / sums.weight[known])) if known.any() else 0.0
    return np.asarray(np.maximum((left + MIN_RECORDS * usual) / (sums.weight + MIN_RECORDS), _LEAST_ERROR**2))


def _variance(sums: Sums, common: Floats, factors: Floats, known: Flags) -> Floats:
    """Of each log f, given the common model."""
    error2 = _error2(sums, common, factors, known)
    return np.asarray(error2 * sums.inflation / np.maximum(sums.weight, 1e-3))


def _spread2(logs: Floats, variance: Floats) -> float:
    between = float(np.sum(np.maximum(logs**2 - variance, 0.0)))
    found = (_PRIOR_ENGINES * _PRIOR_SPREAD**2 + between) / (_PRIOR_ENGINES + len(logs))
    return min(max(found, _LEAST_SPREAD**2), _MOST_SPREAD**2)


def _posterior(logs: Floats, variance: Floats, spread2: float) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each log f under the two-component prior."""
    densities = [
        share * np.exp(-(logs**2) / (2 * (variance + prior2))) / np.sqrt(variance + prior2)
        for share, prior2 in ((1 - _ODD_SHARE, spread2), (_ODD_SHARE, _ODD_SPREAD**2))
    ]
    odd = densities[1] / (densities[0] + densities[1])
    shrunk, full = spread2 / (spread2 + variance), _ODD_SPREAD**2 / (_ODD_SPREAD**2 + variance)
    mean = logs * ((1 - odd) * shrunk + odd * full)
    second = (1 - odd) * (variance * shrunk + (logs * shrunk) ** 2) + odd * (variance * full + (logs * full) ** 2)
    return np.asarray(mean), np.asarray(np.sqrt(np.maximum(second - mean**2, 0.0)))


def _own_models(
    sums: Sums, common: Floats, factors: Floats, known: Flags
) -> dict[int, IterationTimeModel]:
    """The models of engines that differ from the common one by more than a factor."""
    able = np.flatnonzero(known & (sums.weight >= _SHAPE_RECORDS))
    if not able.size:
        return {}
    features, weight = sums.features[able], sums.weight[able]
    base = factors[able, None] * common
    units = _units(base, features, weight)
    ridge = np.zeros_like(features)
    ridge[:, range(len(TERMS)), range(len(TERMS))] = _SHAPE_PRIOR_RECORDS / units**2
    left = sums.product[able] - np.einsum("nij,nj->ni", features, base)
    change = np.linalg.solve(features + ridge, left[..., None])[..., 0]
    gain = np.einsum("ni,nij,nj->n", change, features, change)
    # The noise is what the engine's own coefficients leave.
    noise2 = np.maximum(_error2(sums, common, factors, known)[able] - gain / weight, _LEAST_ERROR**2)
    critical = float(chdtri(len(TERMS), FALSE_ALARM)) * noise2 * np.minimum(sums.inflation[able], _MOST_INFLATION)
    differs = (np.sqrt(np.maximum(gain, 0.0) / weight) > _SHAPE_MATTERS) & (gain > critical)
    found = {}
    for place in np.flatnonzero(differs).tolist():
        if (model := model_of(np.maximum(base[place] + change[place], 0.0))) is not None:
            found[int(able[place])] = model
    return found
