"""The iteration-time model, refined from every measured iteration while serving."""

import math

import numpy as np

from scheduler.estimation.iteration_time_error import PUBLISHED_MAPE, IterationTimeError
from scheduler.estimation.iteration_time_fit import (
    _NO_VARIANCE,
    _PUBLISHED_STD,
    _TERMS,
    MIN_RECORDS,
    _features,
    _is_at_floor,
    _time_model,
)
from scheduler.model.iteration_time import IterationTimeModel, require_number


class OnlineIterationTimeModel:
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

    def __init__(self, prior: IterationTimeModel, *, forgetting: float = 0.998, prior_records: float = 50.0) -> None:
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
        self.time_model = prior
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
        predicted_s = self.time_model.iteration_s(*tokens)
        error = min(seconds / predicted_s - 1, self._LARGEST_ERROR)
        self._judge(predicted_s, error)
        if self._has_changed_speed(seconds / predicted_s):
            self._follow_speed()
            return

        units = np.maximum(self._coefficients, self._SMALLEST_UNITS * self.time_model.shortest_iteration_s)
        features = _features(tokens, _is_at_floor(self.time_model, tokens)) * units / predicted_s
        # Absurd token counts must not make a term look known for ever.
        weight = min(1.0, self._LARGEST_FEATURE / float(features.max()))
        features *= weight
        self._information *= self._forgetting
        self._information += (1 - self._forgetting) * self._least_information + np.outer(features, features)
        self._coefficients += units * np.linalg.solve(self._information, features) * (error * weight)
        np.maximum(self._coefficients, 0, out=self._coefficients)
        self._coefficients[self._base_term] = max(self._coefficients[self._base_term], self._smallest_base_s)
        self.time_model = _time_model(self._coefficients) or self.time_model

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
        self.time_model = _time_model(self._coefficients) or self.time_model
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
    def error(self) -> IterationTimeError:
        """How recent iterations strayed from their predictions; before 32 records, as a published law's did."""
        means = self._means()
        if means is None:
            return IterationTimeError.from_mape(PUBLISHED_MAPE)
        variance = max(means[1] - means[0] ** 2, 0.0)
        correlation = (means[6] - means[0] ** 2) / variance if variance > _NO_VARIANCE else 0.0
        return IterationTimeError(means[0], math.sqrt(variance), min(max(correlation, -1.0), 1.0), float(self._sums[0]))

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
