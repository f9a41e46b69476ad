"""Offline fit of the iteration-time model to measured iterations; `OnlineIterationTimeModel` is its online counterpart.

Both treat τ = max(floor, d0 + d2·prefill + d3·decode) + d1·kv as linear within each of its two regimes: records at the
floor have the features (1, 0, 0, 0, kv), records above it (0, 1, prefill, decode, kv).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from scheduler.model.iteration_time import IterationTimeModel, Tokens

MIN_RECORDS = 32
"""Fewest records for fitting or judging a model."""

_Array = NDArray[np.float64]
TERMS = ("floor_s", "d0_s", "d2_s_per_prefill_token", "d3_s_per_decode_token", "d1_s_per_kv_token")
_LARGEST_CONDITION = 1e3
_FLOOR_ROUNDS = 30
_FLOOR_MIN_RECORDS = 8
_FLOOR_MIN_GAIN = 0.05


@dataclass(frozen=True, slots=True)
class IterationTimeFit:
    """A fitted model. r2 and mape (a fraction) are over the `records` it was fitted to.

    identified: the model's fields that the records determine, if only as 0. The others are 0 because their tokens never
    occurred or, for floor_s, because no floor showed.
    """

    time_model: IterationTimeModel
    r2: float
    mape: float
    records: int
    identified: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FitRejected:
    """These records do not determine a model; `reason` says why."""

    reason: str
    records: int


def fit_iteration_time(
    prefill_tokens: ArrayLike, decode_tokens: ArrayLike, kv_tokens: ArrayLike, seconds: ArrayLike
) -> IterationTimeFit | FitRejected:
    """Least squares for the model's coefficients, none negative, over iterations measured in `seconds`.

    One entry per iteration in each array, tokens as in `IterationTimeModel`. The floor is found by an active set: which
    records lie at it, then their fit, until both agree. It is kept only if it lowers the squared error clearly.
    The caller removes outliers (a first, compiling iteration). Rejects too few records, unusable times and designs
    in which two terms are collinear. Raises ValueError for arrays of different lengths and for token counts that are
    negative or not finite.
    """
    arrays = (prefill_tokens, decode_tokens, kv_tokens, seconds)
    prefill, decode, kv, measured_s = (np.asarray(a, dtype=np.float64).ravel() for a in arrays)
    records = measured_s.size
    tokens = (prefill, decode, kv)
    for name, counts in zip(("prefill_tokens", "decode_tokens", "kv_tokens"), tokens, strict=True):
        if counts.size != records:
            raise ValueError(f"{name} has {counts.size} entries; it must have {records}, as many as seconds")
        if not np.all(np.isfinite(counts) & (counts >= 0)):
            raise ValueError(f"{name} holds negative or non-finite values; token counts must be finite and >= 0")
    if records < MIN_RECORDS:
        return FitRejected(f"{records} records; at least {MIN_RECORDS} are needed", records)
    if unusable := int(np.sum(~(np.isfinite(measured_s) & (measured_s > 0)))):
        return FitRejected(f"{unusable} of {records} records have seconds that are not finite and > 0", records)

    coefficients = _fit_regimes(tokens, measured_s, at_floor=np.zeros(records, dtype=bool))
    if isinstance(coefficients, str):
        return FitRejected(coefficients, records)
    time_model = model_of(coefficients)
    with_floor = _fit_floor(tokens, measured_s)
    if with_floor is not None and (
        time_model is None or _is_clearly_better(with_floor, time_model, tokens, measured_s)
    ):
        time_model = with_floor
    if time_model is None:
        return FitRejected("the time of an empty batch fits to 0 s; records of smaller batches are needed", records)

    variation = float(np.sum((measured_s - measured_s.mean()) ** 2))
    determined = (time_model.floor_s > 0, True, prefill.any(), decode.any(), kv.any())
    return IterationTimeFit(
        time_model=time_model,
        r2=1 - _squared_error(time_model, tokens, measured_s) / variation if variation > 0 else 0.0,
        mape=float(np.mean(np.abs(time_model.iteration_s(*tokens) / measured_s - 1))),
        records=records,
        identified=tuple(term for term, is_determined in zip(TERMS, determined, strict=True) if is_determined),
    )


def features_of(tokens: tuple[Tokens, Tokens, Tokens], at_floor: bool | NDArray[np.bool_]) -> _Array:
    """The features of `TERMS`, along the last axis, in the given regime."""
    prefill, decode, kv = tokens
    above = np.logical_not(at_floor)
    return np.stack([np.asarray(at_floor), above, above * prefill, above * decode, kv], axis=-1, dtype=np.float64)


def is_at_floor(time_model: IterationTimeModel, tokens: tuple[Tokens, Tokens, Tokens]) -> bool | NDArray[np.bool_]:
    return time_model.iteration_s(tokens[0], tokens[1], 0) <= time_model.floor_s


def model_of(coefficients: _Array) -> IterationTimeModel | None:
    """The model with these values of `TERMS`; None if its empty batch would take no time."""
    time_model = dict(zip(TERMS, coefficients.tolist(), strict=True))
    return IterationTimeModel(**time_model) if max(time_model["d0_s"], time_model["floor_s"]) > 0 else None


def _fit_regimes(
    tokens: tuple[_Array, _Array, _Array], measured_s: _Array, at_floor: NDArray[np.bool_]
) -> _Array | str:
    """Non-negative least squares for `TERMS` with the given regimes, or the reason why there is no solution."""
    features = features_of(tokens, at_floor)
    size = np.linalg.norm(features, axis=0)
    occurs = size > 0
    left, singular, right = np.linalg.svd(features[:, occurs] / size[occurs], full_matrices=False)
    if singular[0] > _LARGEST_CONDITION * singular[-1]:
        involved = np.abs(right[-1]) > 0.1
        names = [term for term, is_in in zip(np.array(TERMS)[occurs], involved, strict=True) if is_in]
        return f"the records do not vary enough to tell apart the terms {', '.join(names)}"
    coefficients = np.zeros(len(TERMS))
    coefficients[occurs] = nnls(singular[:, None] * right, left.T @ measured_s)[0] / size[occurs]
    return coefficients


def _fit_floor(tokens: tuple[_Array, _Array, _Array], measured_s: _Array) -> IterationTimeModel | None:
    """The best model with a floor, or None when the records do not show both regimes."""
    computed = tokens[0] + tokens[1]
    time_models = []
    # The active set can settle in a poor place, so it starts from several.
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        time_model, at_floor = None, computed <= np.quantile(computed, share)
        for _ in range(_FLOOR_ROUNDS):
            if min(at_floor.sum(), (~at_floor).sum()) < _FLOOR_MIN_RECORDS:
                time_model = None
                break
            coefficients = _fit_regimes(tokens, measured_s, at_floor)
            time_model = None if isinstance(coefficients, str) else model_of(coefficients)
            previous, at_floor = at_floor, np.asarray(time_model is not None and is_at_floor(time_model, tokens))
            if time_model is None or np.array_equal(at_floor, previous):
                break
        if time_model is not None and time_model.floor_s > time_model.d0_s:
            time_models.append(time_model)
    return min(time_models, key=lambda time_model: _squared_error(time_model, tokens, measured_s), default=None)


def _squared_error(time_model: IterationTimeModel, tokens: tuple[_Array, _Array, _Array], measured_s: _Array) -> float:
    return float(np.sum((time_model.iteration_s(*tokens) - measured_s) ** 2))


def _is_clearly_better(
    with_floor: IterationTimeModel,
    without: IterationTimeModel,
    tokens: tuple[_Array, _Array, _Array],
    measured_s: _Array,
) -> bool:
    """Whether a floor lowers the error enough: by a fixed share, and by twice BIC's penalty for two parameters."""
    error, reference = (_squared_error(time_model, tokens, measured_s) for time_model in (with_floor, without))
    records = measured_s.size
    return bool(error < reference * min(1 - _FLOOR_MIN_GAIN, records ** (-4 / records)))
