"""Estimates with confidence intervals.

Source: the exact Poisson interval of Garwood (1936), with a quasi-Poisson dispersion for bursts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.special import chdtri, gammaincinv

CONFIDENCE = 0.99
"""Confidence of every interval that the controller states."""
FALSE_ALARM = 0.001
"""Accepted probability that a test finds a change in a window without one."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and the interval that covers the truth with probability `CONFIDENCE`."""

    value: float
    low: float
    high: float

    def covers(self, value: float) -> bool:
        """Whether `value` is inside the interval."""
        return self.low <= value <= self.high

    def is_near(self, value: float) -> bool:
        """Whether `value` is in the inner half of the interval, where a difference is mostly noise."""
        return self.value + self.low <= 2 * value <= self.value + self.high


def mean_estimate(mean: float, std: float, samples: float) -> Estimate:
    """The mean of independent observations with its normal interval, >= 0; `samples` may be an effective number."""
    half = _two_sided_z() * std / math.sqrt(samples) if samples > 0 else math.inf
    return Estimate(mean, max(0.0, mean - half), mean + half)


def rate_estimate(
    events: float, seconds: float, *, dispersion: float = 1.0, confidence: float = CONFIDENCE
) -> Estimate:
    """Events per second with Garwood's interval; `dispersion` is the counts' variance over their mean, at least 1."""
    seen, tail, per_s = events / dispersion, (1 - confidence) / 2, dispersion / seconds
    low = float(gammaincinv(seen, tail)) if seen > 0 else 0.0
    return Estimate(events / seconds, low * per_s, float(gammaincinv(seen + 1, 1 - tail)) * per_s)


def _two_sided_z() -> float:
    return math.sqrt(float(chdtri(1, 1 - CONFIDENCE)))
