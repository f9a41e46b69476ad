"""How many requests will be offered when a replica that is started now has come up: level, trend, and how sure that is.

Counted are all requests of a model, those that are rejected too. Forecasts are lines through the latest counts
(weighted least squares, the trend shrunk by its own significance as in James and Stein's estimator), over several spans
of which the one with the smallest errors so far is used. Those errors, as an index of dispersion (variance over mean)
of the counts in one start-up time, say how far the load may be off; they are never taken to be less than the counts'
own fluctuation allows. A sudden change, which no earlier count announced, is found by a scan over the latest counts as
in `scheduler.estimation.arrival_rates`; from then on only what follows it counts, and it is no error of the forecast.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from scheduler.estimation.intervals import FALSE_ALARM

SPANS = (2.0, 4.0, 8.0, 16.0)
"""Lengths of history through which a line is drawn, in horizons."""
_USUAL = 1
_BINS_IN_HORIZON = 24
_MEMORY = 20.0
"""Horizons over which errors of forecasts are remembered."""
_PRIOR = 2.0
"""Horizons for which a Poisson process' own dispersion counts as seen."""
_BEFORE, _LATEST = 8.0, 2.0
"""Horizons that a sudden change is compared with, and within which it is looked for."""
_LEAST_BEFORE, _LEAST_AFTER, _LEAST_FREE = 4, 2, 2
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RateAhead:
    """The rate of offered requests one horizon ahead, in requests per second, as a normal distribution.

    now_rps: the rate at present. dispersion: variance over mean of the counts in one horizon around their forecast.
    """

    now_rps: float
    mean_rps: float
    std_rps: float
    dispersion: float

    def quantile(self, probability: float) -> float:
        """What the rate does not exceed with this probability; never below 0."""
        return max(0.0, self.mean_rps + self.std_rps * float(ndtri(probability)))


class OfferedLoad:
    """The counts of one model's requests, and what they say of the time ahead.

    horizon_s: how far ahead, and the length of the time for which the mean rate is asked.
    """

    def __init__(self, horizon_s: float) -> None:
        self._horizon_s = horizon_s
        self._bins: deque[tuple[float, float, float]] = deque()
        self._now_s, self._cut_s = 0.0, -math.inf
        self._open_s = self._open_requests = 0.0
        self._pending: deque[tuple[float, Floats]] = deque()
        self._dispersions: Floats | None = None
        self._scored_s = 0.0

    def follow(self, horizon_s: float) -> None:
        """Look this far ahead from now on; what is known of errors is of the old horizon, and is forgotten."""
        if horizon_s != self._horizon_s:
            self._horizon_s, self._dispersions = horizon_s, None
            self._pending.clear()

    def observe(self, seconds: float, requests: float) -> None:
        """So many requests were offered in the `seconds` since the last call."""
        self._open_s, self._open_requests = self._open_s + seconds, self._open_requests + requests
        if self._open_s < self._horizon_s / _BINS_IN_HORIZON or self._open_s <= 0:
            return
        self._now_s += self._open_s
        self._bins.append((self._now_s, self._open_s, self._open_requests))
        self._open_s = self._open_requests = 0.0
        while self._bins[0][0] <= self._now_s - SPANS[-1] * self._horizon_s:
            self._bins.popleft()
        self._score()
        ends_s, seconds_each, counts = self._columns()
        changed_s = _changed_at(
            ends_s, seconds_each, counts, before_s=_BEFORE * self._horizon_s, latest_s=_LATEST * self._horizon_s,
            not_before_s=self._cut_s if self._cut_s <= self._now_s - _LATEST * self._horizon_s else -math.inf,
        )
        if changed_s is not None and changed_s > self._cut_s:
            self._cut_s = changed_s
            self._pending.clear()
        then_s = self._now_s + self._horizon_s
        self._pending.append((self._now_s, np.array([line.at(then_s) for line in self._lines()])))

    def ahead(self) -> RateAhead | None:
        """The rate one horizon ahead; None before anything is counted."""
        lines = self._lines()
        if not lines:
            return None
        known = self._dispersions
        line = lines[_USUAL if known is None else int(np.argmin(known))]
        mean_rps = line.at(self._now_s + self._horizon_s)
        least_rps = max(mean_rps, line.least_rps)
        own = line.dispersion + line.variance_at(self._now_s + self._horizon_s) * self._horizon_s / least_rps
        dispersion = own if known is None else max(own, float(known.min()))
        return RateAhead(
            line.at(self._now_s), mean_rps, math.sqrt(dispersion * least_rps / self._horizon_s), dispersion
        )

    def _columns(self) -> tuple[Floats, Floats, Floats]:
        ends_s, seconds, counts = np.array(self._bins, dtype=np.float64).T
        return ends_s, seconds, counts

    def _lines(self) -> list[_Line]:
        """A line through the counts of each span, of those since the last sudden change."""
        if not self._bins:
            return []
        ends_s, seconds, counts = self._columns()
        bursts, lines = _burstiness(seconds, counts), []
        for span in SPANS:
            first = int(np.searchsorted(ends_s, max(self._now_s - span * self._horizon_s, self._cut_s), side="right"))
            first = min(first, len(ends_s) - 1)
            lines.append(_Line(ends_s[first:], seconds[first:], counts[first:], bursts))
        return lines

    def _score(self) -> None:
        """Compare forecasts with what came: the counts of one horizon around the time that they were for."""
        ends_s, seconds, counts = self._columns()
        total = np.cumsum(counts)
        half_s = self._horizon_s / 2
        while self._pending and self._pending[0][0] + 3 * half_s <= self._now_s:
            made_s, rates = self._pending.popleft()
            begun = (ends_s[0] - seconds[0], 0.0)
            came = np.diff(np.interp(
                (made_s + half_s, made_s + 3 * half_s), (begun[0], *ends_s), (begun[1], *total)
            ))[0]
            expected = rates * self._horizon_s
            squares = (came - expected) ** 2 / np.maximum(expected, max(came, 1.0))
            if self._dispersions is None:
                self._dispersions, self._scored_s = np.ones(len(SPANS)), _PRIOR * self._horizon_s
            step_s = float(seconds[-1])
            self._scored_s = min(self._scored_s + step_s, _MEMORY * self._horizon_s)
            self._dispersions += (squares - self._dispersions) * step_s / self._scored_s


class _Line:
    """Level and trend of counts in bins: end times and lengths in seconds."""

    def __init__(self, ends_s: Floats, seconds: Floats, counts: Floats, bursts: float) -> None:
        self._total_s, self._end_s = float(seconds.sum()), float(ends_s[-1])
        middles_s = ends_s - seconds / 2
        self._centre_s = float(middles_s @ seconds) / self._total_s
        self._level_rps = float(counts.sum()) / self._total_s
        offsets_s = middles_s - self._centre_s
        self._spread = float(seconds @ offsets_s**2)
        slope = float(offsets_s @ counts) / self._spread if self._spread > 0 else 0.0
        self.least_rps = 1.0 / self._total_s
        expected = np.maximum((self._level_rps + slope * offsets_s) * seconds, self.least_rps * seconds)
        free = len(counts) - 2
        own = float(((counts - expected) ** 2 / expected).sum()) / free if free >= _LEAST_FREE else 1.0
        self.dispersion = max(bursts, own)
        noise = self.dispersion * max(self._level_rps, self.least_rps)
        self._level_variance, self._slope_variance = noise / self._total_s, 0.0
        significance = slope**2 * self._spread / noise if self._spread > 0 else 0.0
        shrunk = max(0.0, 1 - 1 / significance) if significance > 0 and free >= _LEAST_FREE else 0.0
        self._slope = shrunk * slope
        if self._spread > 0:
            self._slope_variance = shrunk**2 * noise / self._spread

    def at(self, time_s: float) -> float:
        """Requests per second at a time, at least 0."""
        return max(0.0, self._level_rps + self._slope * self._offset_s(time_s))

    def variance_at(self, time_s: float) -> float:
        """Of that rate, as far as the counts leave it open."""
        return self._level_variance + self._slope_variance * self._offset_s(time_s) ** 2

    def _offset_s(self, time_s: float) -> float:
        """From the middle; a trend is followed no further than it has been seen."""
        return min(time_s, self._end_s + self._total_s) - self._centre_s


def _changed_at(
    ends_s: Floats, seconds: Floats, counts: Floats, *, before_s: float, latest_s: float, not_before_s: float
) -> float | None:
    """Where the latest counts leave the line through those before; None if they are as it lets expect."""
    found: tuple[float, float] | None = None
    lengths = _suffixes(seconds, latest_s)
    if not lengths:
        return None
    critical = -float(ndtri(FALSE_ALARM / 2 / len(lengths) / len(counts)))
    for length in lengths:
        split = len(counts) - length
        first = int(np.searchsorted(ends_s, max(ends_s[split - 1] - before_s, not_before_s), side="right"))
        if split - first < _LEAST_BEFORE:
            continue
        line = _Line(
            ends_s[first:split], seconds[first:split], counts[first:split],
            _burstiness(seconds[first:split], counts[first:split]),
        )
        middle_s, after_s = float(ends_s[-1] + ends_s[split - 1]) / 2, float(seconds[split:].sum())
        expected = max(line.at(middle_s), line.least_rps) * after_s
        std = math.sqrt(line.dispersion * expected + line.variance_at(middle_s) * after_s**2)
        z = abs(float(counts[split:].sum()) - expected) / std
        if z > critical and (found is None or z > found[0]):
            found = z, float(ends_s[split - 1])
    return None if found is None else found[1]


def _suffixes(seconds: Floats, latest_s: float) -> Sequence[int]:
    """Numbers of latest bins to look at, each about a half more than the one before."""
    most = min(int(np.searchsorted(np.cumsum(seconds[::-1]), latest_s, side="right")), len(seconds) - _LEAST_BEFORE)
    lengths, length = [], _LEAST_AFTER
    while length <= most:
        lengths.append(length)
        length = max(length + 1, int(1.5 * length))
    return lengths


def _burstiness(seconds: Floats, counts: Floats) -> float:
    """Variance over mean of the counts in bins, at least 1 (Poisson arrivals): by the differences of neighbours, which
    a trend does not change and a step only once (von Neumann), so without the largest."""
    if len(counts) < 3 or not counts.any():
        return 1.0
    rate = counts.sum() / seconds.sum()
    differences = np.diff(counts / seconds) ** 2 / (rate / seconds[1:] + rate / seconds[:-1])
    return max(1.0, float(np.sort(differences)[:-1].mean()))
