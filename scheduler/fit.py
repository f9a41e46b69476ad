"""The service-time law from measured iterations: all at once (`fit_law`) or one by one while serving (`OnlineLaw`).

Both treat τ = max(floor, d0 + d2·prefill + d3·decode) + d1·kv as linear within each of its two regimes: records at the
floor have the features (1, 0, 0, 0, kv), records above it (0, 1, prefill, decode, kv).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from scheduler.law import ServiceTimeLaw, Tokens, require_number
from scheduler.margin import PUBLISHED_MAPE, Fluctuation

MIN_RECORDS = 32
"""Fewest records to fit a law from, or to judge one by."""

_Array = NDArray[np.float64]
_TERMS = ("floor_s", "d0_s", "d2_s_per_prefill_token", "d3_s_per_decode_token", "d1_s_per_kv_token")
_LARGEST_CONDITION = 1e3
_NO_VARIANCE = 1e-20
_PUBLISHED_STD = Fluctuation.from_mape(PUBLISHED_MAPE).std
_FLOOR_ROUNDS = 30
_FLOOR_MIN_RECORDS = 8
_FLOOR_MIN_GAIN = 0.05


@dataclass(frozen=True, slots=True)
class LawFit:
    """A fitted law. r2 and mape (a fraction) are over the `records` it was fitted to.

    identified: the law's fields that the records determine, if only as 0. The others are 0 because their tokens never
    occurred or, for floor_s, because no floor showed.
    """

    law: ServiceTimeLaw
    r2: float
    mape: float
    records: int
    identified: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FitRefused:
    """No law can be told from these records; `reason` says why."""

    reason: str
    records: int


def fit_law(
    prefill_tokens: ArrayLike, decode_tokens: ArrayLike, kv_tokens: ArrayLike, seconds: ArrayLike
) -> LawFit | FitRefused:
    """Least squares for the law's coefficients, none negative, over iterations measured in `seconds`.

    One entry per iteration in each array, tokens as in `ServiceTimeLaw`. The floor is found by an active set: which
    records lie at it, then their fit, until both agree. It is kept only if it lowers the squared error clearly.
    Outliers (a first, compiling iteration) are the caller's to leave out. Refuses too few records, unusable times and
    designs in which two terms cannot be told apart. Raises ValueError for arrays of different lengths and for token
    counts that are negative or not finite.
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
        return FitRefused(f"{records} records; at least {MIN_RECORDS} are needed", records)
    if unusable := int(np.sum(~(np.isfinite(measured_s) & (measured_s > 0)))):
        return FitRefused(f"{unusable} of {records} records have seconds that are not finite and > 0", records)

    coefficients = _fit_regimes(tokens, measured_s, at_floor=np.zeros(records, dtype=bool))
    if isinstance(coefficients, str):
        return FitRefused(coefficients, records)
    law = _law(coefficients)
    with_floor = _fit_floor(tokens, measured_s)
    if with_floor is not None and (law is None or _is_clearly_better(with_floor, law, tokens, measured_s)):
        law = with_floor
    if law is None:
        return FitRefused("the time of an empty batch fits to 0 s; records of smaller batches are needed", records)

    variation = float(np.sum((measured_s - measured_s.mean()) ** 2))
    determined = (law.floor_s > 0, True, prefill.any(), decode.any(), kv.any())
    return LawFit(
        law=law,
        r2=1 - _squared_error(law, tokens, measured_s) / variation if variation > 0 else 0.0,
        mape=float(np.mean(np.abs(law.iteration_s(*tokens) / measured_s - 1))),
        records=records,
        identified=tuple(term for term, is_determined in zip(_TERMS, determined, strict=True) if is_determined),
    )


def _features(tokens: tuple[Tokens, Tokens, Tokens], at_floor: bool | NDArray[np.bool_]) -> _Array:
    """What each term of `_TERMS` multiplies, along the last axis, in the regime given."""
    prefill, decode, kv = tokens
    above = np.logical_not(at_floor)
    return np.stack([np.asarray(at_floor), above, above * prefill, above * decode, kv], axis=-1, dtype=np.float64)


def _is_at_floor(law: ServiceTimeLaw, tokens: tuple[Tokens, Tokens, Tokens]) -> bool | NDArray[np.bool_]:
    return law.iteration_s(tokens[0], tokens[1], 0) <= law.floor_s


def _law(coefficients: _Array) -> ServiceTimeLaw | None:
    """The law with these values of `_TERMS`, or None when its empty batch would take no time."""
    law = dict(zip(_TERMS, coefficients.tolist(), strict=True))
    return ServiceTimeLaw(**law) if max(law["d0_s"], law["floor_s"]) > 0 else None


def _fit_regimes(
    tokens: tuple[_Array, _Array, _Array], measured_s: _Array, at_floor: NDArray[np.bool_]
) -> _Array | str:
    """Non-negative least squares for `_TERMS` with the regimes given, or the reason why there is none."""
    features = _features(tokens, at_floor)
    size = np.linalg.norm(features, axis=0)
    occurs = size > 0
    left, singular, right = np.linalg.svd(features[:, occurs] / size[occurs], full_matrices=False)
    if singular[0] > _LARGEST_CONDITION * singular[-1]:
        involved = np.abs(right[-1]) > 0.1
        names = [term for term, is_in in zip(np.array(_TERMS)[occurs], involved, strict=True) if is_in]
        return f"the records do not vary enough to tell apart the terms {', '.join(names)}"
    coefficients = np.zeros(len(_TERMS))
    coefficients[occurs] = nnls(singular[:, None] * right, left.T @ measured_s)[0] / size[occurs]
    return coefficients


def _fit_floor(tokens: tuple[_Array, _Array, _Array], measured_s: _Array) -> ServiceTimeLaw | None:
    """The best law with a floor, or None when the records do not show both regimes."""
    computed = tokens[0] + tokens[1]
    laws = []
    # The active set can settle in a poor place, so it starts from several.
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        law, at_floor = None, computed <= np.quantile(computed, share)
        for _ in range(_FLOOR_ROUNDS):
            if min(at_floor.sum(), (~at_floor).sum()) < _FLOOR_MIN_RECORDS:
                law = None
                break
            coefficients = _fit_regimes(tokens, measured_s, at_floor)
            law = None if isinstance(coefficients, str) else _law(coefficients)
            previous, at_floor = at_floor, np.asarray(law is not None and _is_at_floor(law, tokens))
            if law is None or np.array_equal(at_floor, previous):
                break
        if law is not None and law.floor_s > law.d0_s:
            laws.append(law)
    return min(laws, key=lambda law: _squared_error(law, tokens, measured_s), default=None)


def _squared_error(law: ServiceTimeLaw, tokens: tuple[_Array, _Array, _Array], measured_s: _Array) -> float:
    return float(np.sum((law.iteration_s(*tokens) - measured_s) ** 2))


def _is_clearly_better(
    with_floor: ServiceTimeLaw, without: ServiceTimeLaw, tokens: tuple[_Array, _Array, _Array], measured_s: _Array
) -> bool:
    """A floor must pay for itself: by a fixed share, and for two more free parameters by twice what BIC asks."""
    error, reference = (_squared_error(law, tokens, measured_s) for law in (with_floor, without))
    records = measured_s.size
    return bool(error < reference * min(1 - _FLOOR_MIN_GAIN, records ** (-4 / records)))


class OnlineLaw:
    """The law of a running engine: recursive least squares that forgets old iterations exponentially.

    prior: the law to start from. forgetting: weight that a record keeps with every newer one, in (0, 1]; 0.998 looks
    back over some 500 iterations. prior_records: how many records the prior is worth, > 0. Not in the paper, which
    fits its law offline.

    An engine that changes its speed is found by CUSUM over the relative errors (Page 1954): the whole law is scaled to
    the speed since the change, is worth no more than a prior again, and errors made meanwhile are not held against it.

    Terms are measured in units of their present size and records in units of their prediction, so errors are relative
    and what was learned keeps its worth when the engine's speed changes. A prior without a floor stays without one.
    Raises ValueError for parameters out of range; records never raise.
    """

    _LARGEST_ERROR = 1.0
    """A record counts as at most twice its prediction: a lasting change is followed, a hiccup moves little."""
    _LARGEST_FEATURE = 10.0
    _LARGEST_TOKENS = 1e9
    _SMALLEST_BASE = 1e-4
    """The base time never falls below this share of the prior's."""
    _SMALLEST_UNITS = np.array([1, 1, 1e-3, 1e-3, 1e-5])
    """Shares of the base time, plausible sizes of `_TERMS`, from which a term that is near 0 can grow."""
    _CUSUM_SLACK, _CUSUM_BOUND, _CUSUM_LIMIT = 0.5, 3.0, 20.0
    """Page's test for a change of speed, in standard deviations. No record counts for more than the bound, so fewer
    than 8 never are a change; a lasting one of one standard deviation shows after 40. With independent errors a false
    alarm comes once in some 10^9 records (Siegmund's approximation), which leaves room for correlated ones."""
    _LEAST_SPREAD = 0.002
    _LARGEST_CHANGE = 3.0
    """A larger change of speed is followed in several steps."""

    def __init__(self, prior: ServiceTimeLaw, *, forgetting: float = 0.998, prior_records: float = 50.0) -> None:
        if not 0 < forgetting <= 1:
            raise ValueError(f"forgetting is {forgetting!r}; it must be above 0 and at most 1")
        require_number("prior_records", prior_records, allow_zero=False)
        self._coefficients = np.array([getattr(prior, term) for term in _TERMS])
        self._base_term = _TERMS.index("floor_s" if prior.floor_s > 0 else "d0_s")
        self._smallest_base_s = self._SMALLEST_BASE * prior.shortest_iteration_s
        self._forgetting = forgetting
        self._information = prior_records * np.eye(len(_TERMS))
        # Information never falls below a twentieth of the prior's. That bounds the covariance in directions that recent
        # records do not excite; without it, forgetting alone would let it grow without limit.
        self._least_information = 0.05 * self._information
        self._sums = np.zeros(8)
        self._last_error = 0.0
        self._faster = self._slower = 0.0
        self._since_quiet: list[float] = []
        self._sums_when_quiet = self._sums.copy()
        self.law = prior
        """The present law, always a valid one."""
        self.records = 0
        """Records used."""
        self.changes = 0
        """Changes of the engine's speed found."""
        self.ignored = 0
        """Records left out: token counts that are not between 0 and 1e9, times that are not finite and > 0."""

    def update(self, prefill_tokens: float, decode_tokens: float, kv_tokens: float, seconds: float) -> None:
        """Learn from one iteration; a record that cannot be one is counted in `ignored`."""
        tokens = (prefill_tokens, decode_tokens, kv_tokens)
        if not (all(0 <= t <= self._LARGEST_TOKENS for t in tokens) and 0 < seconds < math.inf):
            self.ignored += 1
            return
        self.records += 1
        predicted_s = self.law.iteration_s(*tokens)
        error = min(seconds / predicted_s - 1, self._LARGEST_ERROR)
        self._judge(predicted_s, error)
        if self._has_changed_speed(seconds / predicted_s):
            self._follow_speed()
            return

        units = np.maximum(self._coefficients, self._SMALLEST_UNITS * self.law.shortest_iteration_s)
        features = _features(tokens, _is_at_floor(self.law, tokens)) * units / predicted_s
        # Absurd token counts must not make a term look known for ever.
        weight = min(1.0, self._LARGEST_FEATURE / float(features.max()))
        features *= weight
        self._information *= self._forgetting
        self._information += (1 - self._forgetting) * self._least_information + np.outer(features, features)
        self._coefficients += units * np.linalg.solve(self._information, features) * (error * weight)
        np.maximum(self._coefficients, 0, out=self._coefficients)
        self._coefficients[self._base_term] = max(self._coefficients[self._base_term], self._smallest_base_s)
        self.law = _law(self._coefficients) or self.law

    def _has_changed_speed(self, ratio: float) -> bool:
        """Page's test, with what was measured over what was predicted; a lone outlier cannot trigger it."""
        known = self.relative_error_std
        spread = max(_PUBLISHED_STD if known is None else known, self._LEAST_SPREAD)
        error = min(max((ratio - 1) / spread, -self._CUSUM_BOUND), self._CUSUM_BOUND)
        self._slower = max(0.0, self._slower + error - self._CUSUM_SLACK)
        self._faster = max(0.0, self._faster - error - self._CUSUM_SLACK)
        if not self._slower and not self._faster:
            self._since_quiet.clear()
            self._sums_when_quiet = self._sums.copy()
            return False
        self._since_quiet.append(ratio)
        return max(self._slower, self._faster) > self._CUSUM_LIMIT

    def _follow_speed(self) -> None:
        """Scale the law to the speed since the change, and judge it as before the change."""
        factor = float(np.median(self._since_quiet[-MIN_RECORDS:]))
        factor = min(max(factor, 1 / self._LARGEST_CHANGE), self._LARGEST_CHANGE)
        self.changes += 1
        self._coefficients *= factor
        self._coefficients[self._base_term] = max(self._coefficients[self._base_term], self._smallest_base_s)
        self.law = _law(self._coefficients) or self.law
        self._information *= min(1.0, float(np.trace(20 * self._least_information) / np.trace(self._information)))
        self._sums = self._sums_when_quiet * np.array([1, 1, 1, 1, factor, factor**2, factor**2, 1])
        self._slower = self._faster = 0.0
        self._since_quiet.clear()

    def _judge(self, predicted_s: float, error: float) -> None:
        """Add one prediction, made before the record was learned from, to the running sums."""
        counted_s = predicted_s * (1 + error)
        residual_s = counted_s - predicted_s
        share = min(abs(residual_s) / counted_s, 1.0) if counted_s > 0 else 1.0
        self._sums *= self._forgetting
        self._sums += (1.0, error, error**2, share, counted_s, counted_s**2, residual_s**2, error * self._last_error)
        self._last_error = error

    def _means(self) -> list[float] | None:
        if self.records < MIN_RECORDS or not self._sums[0]:
            return None
        means: list[float] = (self._sums[1:] / self._sums[0]).tolist()
        return means

    @property
    def mape(self) -> float | None:
        """Mean |measured − predicted| / measured of recent predictions, a fraction; None before 32 records."""
        means = self._means()
        return None if means is None else means[2]

    @property
    def relative_error_std(self) -> float | None:
        """Standard deviation of (measured − predicted) / predicted of recent predictions; None before 32 records."""
        means = self._means()
        return None if means is None else math.sqrt(max(means[1] - means[0] ** 2, 0.0))

    @property
    def fluctuation(self) -> Fluctuation:
        """How recent iterations strayed from their predictions; before 32 records, as a published law's did."""
        means = self._means()
        if means is None:
            return Fluctuation.from_mape(PUBLISHED_MAPE)
        variance = max(means[1] - means[0] ** 2, 0.0)
        correlation = (means[6] - means[0] ** 2) / variance if variance > _NO_VARIANCE else 0.0
        return Fluctuation(means[0], math.sqrt(variance), min(max(correlation, -1.0), 1.0), float(self._sums[0]))

    @property
    def iteration_time_s(self) -> tuple[float, float] | None:
        """Mean and standard deviation of recent iterations' seconds; None before 32 records."""
        means = self._means()
        return None if means is None else (means[3], math.sqrt(max(means[4] - means[3] ** 2, 0.0)))

    @property
    def r2(self) -> float | None:
        """Share of the recent times' variance that was predicted; None before 32 records or without variance."""
        means = self._means()
        if means is None:
            return None
        variance = means[4] - means[3] ** 2
        return 1 - means[5] / variance if variance > 1e-12 * means[4] else None
