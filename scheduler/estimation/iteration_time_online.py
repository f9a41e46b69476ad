"""The iteration-time model, refined from every measured iteration while serving.

Three parts: `RecursiveLeastSquares` learns the model, `SpeedChange` detects a change of the engine's speed,
`ErrorStatistics` measures the errors of recent predictions.
"""

from __future__ import annotations

import math

import numpy as np

from scheduler.estimation.error_statistics import ErrorStatistics
from scheduler.estimation.iteration_sums import IterationSums
from scheduler.estimation.iteration_time_error import PUBLISHED_MAPE, IterationTimeError
from scheduler.estimation.iteration_time_fit import MIN_RECORDS, TERMS, features_of, is_at_floor, model_of
from scheduler.estimation.measured_errors import MeasuredErrors
from scheduler.model.iteration_time import IterationTimeModel, require_number

_LARGEST_TOKENS = 1e9
_LARGEST_ERROR = 1.0
"""A record counts as at most twice its prediction, so that a single outlier moves the model little."""
_PUBLISHED_STD = IterationTimeError.from_mape(PUBLISHED_MAPE).std


class OnlineIterationTimeModel(MeasuredErrors):
    """The model of a running engine: recursive least squares that forgets old iterations exponentially.

    prior: the initial model. forgetting: factor on a record's weight per newer record, in (0, 1]; 0.998 looks back over
    some 500 iterations. prior_records: the prior's weight in records, > 0. Not in the paper, which fits offline.

    CUSUM detects a change of the engine's speed; the coefficients are rescaled, confidence is reset to the prior's, and
    errors during the transition are left out of the error statistics.
    Raises ValueError for parameters out of range; records never raise.
    """

    def __init__(self, prior: IterationTimeModel, *, forgetting: float = 0.998, prior_records: float = 50.0) -> None:
        if not 0 < forgetting <= 1:
            raise ValueError(f"forgetting is {forgetting!r}; it must be above 0 and at most 1")
        require_number("prior_records", prior_records, allow_zero=False)
        self._fit = RecursiveLeastSquares(prior, forgetting, prior_records)
        self._speed = SpeedChange()
        self._forgetting = forgetting
        self._statistics = self._statistics_when_quiet = ErrorStatistics()
        self.sums = IterationSums(forgetting)
        """What a pool of engines learns from."""
        self.records = 0
        """Records used."""
        self.changes = 0
        """Detected changes of the engine's speed."""
        self.ignored = 0
        """Ignored records: token counts outside 0 to 1e9, times that are not finite and > 0."""

    @property
    def time_model(self) -> IterationTimeModel:
        """The present model, always a valid one."""
        return self._fit.time_model

    def update(self, prefill_tokens: float, decode_tokens: float, kv_tokens: float, seconds: float) -> None:
        """Learn from one iteration; invalid records only count in `ignored`."""
        tokens = (prefill_tokens, decode_tokens, kv_tokens)
        if not (all(0 <= t <= _LARGEST_TOKENS for t in tokens) and 0 < seconds < math.inf):
            self.ignored += 1
            return
        self.records += 1
        predicted_s = self.time_model.iteration_s(*tokens)
        error = min(seconds / predicted_s - 1, _LARGEST_ERROR)
        self._statistics = self._statistics.with_prediction(predicted_s, error, self._forgetting)
        known = self.relative_error_std
        factor = self._speed.observe(seconds / predicted_s, _PUBLISHED_STD if known is None else known)
        if factor is not None:
            self.changes += 1
            self._fit.follow_speed(factor)
            self.sums.restart()
            last_error = self._statistics.last_error
            self._statistics = self._statistics_when_quiet.with_times_scaled(factor, last_error)
            return
        if self._speed.is_quiet:
            self._statistics_when_quiet = self._statistics
        self.sums.observe(tokens, bool(is_at_floor(self.time_model, tokens)), predicted_s, predicted_s * (1 + error))
        self._fit.learn(tokens, predicted_s, error)

    @property
    def statistics(self) -> ErrorStatistics:
        """The errors of recent predictions, however few."""
        return self._statistics

    @property
    def relative_error_std(self) -> float | None:
        """Standard deviation of (measured − predicted) / predicted of recent predictions; None before 32 records."""
        return self._known.error.std if self._known else None


class RecursiveLeastSquares:
    """The model's coefficients by recursive least squares with exponential forgetting.

    Terms are in units of their present size and records in units of their prediction, so errors are relative and the
    coefficients' precision survives a change of speed. A prior without a floor stays without one.
    """

    _LARGEST_FEATURE = 10.0
    _SMALLEST_BASE = 1e-4
    """The base time never falls below this share of the prior's."""
    _SMALLEST_UNITS = np.array([1, 1, 1e-3, 1e-3, 1e-5])
    """Plausible sizes of `TERMS` as shares of the base time, from which a term near 0 can grow."""

    def __init__(self, prior: IterationTimeModel, forgetting: float, prior_records: float) -> None:
        self.time_model = prior
        self._coefficients = np.array([getattr(prior, term) for term in TERMS])
        self._base_term = TERMS.index("floor_s" if prior.floor_s > 0 else "d0_s")
        self._smallest_base_s = self._SMALLEST_BASE * prior.shortest_iteration_s
        self._forgetting = forgetting
        self._information = prior_records * np.eye(len(TERMS))
        # Information never falls below a twentieth of the prior's. That bounds the covariance in directions that recent
        # records do not excite; without it, forgetting alone would let it grow without limit.
        self._least_information = 0.05 * self._information

    def learn(self, tokens: tuple[float, float, float], predicted_s: float, error: float) -> None:
        """From an iteration with these tokens (prefill, decode, KV) and the relative error of its prediction."""
        units = np.maximum(self._coefficients, self._SMALLEST_UNITS * self.time_model.shortest_iteration_s)
        features = features_of(tokens, is_at_floor(self.time_model, tokens)) * units / predicted_s
        # Absurd token counts must not make a term look certain for ever.
        weight = min(1.0, self._LARGEST_FEATURE / float(features.max()))
        features *= weight
        self._information *= self._forgetting
        self._information += (1 - self._forgetting) * self._least_information + np.outer(features, features)
        self._coefficients += units * np.linalg.solve(self._information, features) * (error * weight)
        np.maximum(self._coefficients, 0, out=self._coefficients)
        self._take_over()

    def follow_speed(self, factor: float) -> None:
        """Scale all terms by `factor` and reset their confidence to the prior's."""
        self._coefficients *= factor
        self._take_over()
        self._information *= min(1.0, float(np.trace(20 * self._least_information) / np.trace(self._information)))

    def _take_over(self) -> None:
        self._coefficients[self._base_term] = max(self._coefficients[self._base_term], self._smallest_base_s)
        self.time_model = model_of(self._coefficients) or self.time_model


class SpeedChange:
    """Page's CUSUM test (1954) for a lasting change of an engine's speed, over measured/predicted seconds.

    In standard deviations of the relative error. Each record is bounded, so fewer than 9 never make a change; a lasting
    one of one standard deviation is detected after 40. With independent errors there is a false alarm in some 10^9
    records (Siegmund's approximation), which leaves room for correlated ones.
    """

    _SLACK, _BOUND, _LIMIT = 0.5, 3.0, 20.0
    _LEAST_SPREAD = 0.002
    _LARGEST_CHANGE = 3.0
    """A larger change of speed is followed in several steps."""

    def __init__(self) -> None:
        self._faster = self._slower = 0.0
        self._since_quiet: list[float] = []

    @property
    def is_quiet(self) -> bool:
        """Whether there is no evidence of a change now."""
        return not self._slower and not self._faster

    def observe(self, ratio: float, error_std: float) -> float | None:
        """Add a record; returns the factor by which iterations have become longer, None without a change."""
        error = (ratio - 1) / max(error_std, self._LEAST_SPREAD)
        error = min(max(error, -self._BOUND), self._BOUND)
        self._slower = max(0.0, self._slower + error - self._SLACK)
        self._faster = max(0.0, self._faster - error - self._SLACK)
        if self.is_quiet:
            self._since_quiet.clear()
            return None
        self._since_quiet.append(ratio)
        if max(self._slower, self._faster) <= self._LIMIT:
            return None
        factor = float(np.median(self._since_quiet[-MIN_RECORDS:]))
        self._faster = self._slower = 0.0
        self._since_quiet.clear()
        return min(max(factor, 1 / self._LARGEST_CHANGE), self._LARGEST_CHANGE)
