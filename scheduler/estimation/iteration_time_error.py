"""Errors of measured iterations under the iteration-time model.

Errors average out over an output's iterations, less so with a positive correlation between successive errors.
Source: the variance of the mean of a first-order autoregressive process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri

from scheduler.estimation.intervals import CONFIDENCE, Estimate

PUBLISHED_MAPE = 0.019
"""Mean relative error of a linear model fitted on an A100, from arXiv 2504.11320; the prior for every model."""
_MOST_CORRELATED = 0.99


@dataclass(frozen=True, slots=True)
class IterationTimeError:
    """Relative errors of iterations under the iteration-time model, (measured − predicted)/predicted.

    mean, std: of one iteration; correlation: of successive errors, from −1 to 1; iterations: effective number of
    observations (infinite: exact).
    """

    mean: float = 0.0
    std: float = 0.0
    correlation: float = 0.0
    iterations: float = math.inf

    @classmethod
    def from_mape(cls, mape: float) -> IterationTimeError:
        """The statistics of independent normal errors with this mean absolute value."""
        return cls(std=mape * math.sqrt(math.pi / 2))

    @property
    def std_estimate(self) -> Estimate:
        """The standard deviation with its interval, from χ² over the effective number of independent iterations."""
        if not math.isfinite(self.iterations) or self.std == 0:
            return Estimate(self.std, self.std, self.std)
        free, tail = max(self.iterations / self.inflation - 1, 1.0), (1 - CONFIDENCE) / 2
        low, high = (self.std * math.sqrt(free / float(chdtri(free, p))) for p in (tail, 1 - tail))
        return Estimate(self.std, low, high)

    def std_of_mean(self, iterations: NDArray[np.float64]) -> NDArray[np.float64]:
        """Standard deviation of the mean over `iterations` consecutive iterations (>= 1), with its own uncertainty."""
        rho, bound = self._rho, self.std_estimate.high
        # Var of the mean of n: σ²/n · (1 + 2 Σ_{k<n} (1 − k/n) ρ^k), the sum in closed form.
        n = np.asarray(iterations, dtype=np.float64)
        factor = (1 + rho) / (1 - rho) - 2 * rho * (1 - rho**n) / (n * (1 - rho) ** 2)
        own = bound**2 * np.maximum(factor, 0.0) / n
        of_time_model = 0.0 if math.isinf(self.iterations) else bound**2 * self.inflation / max(self.iterations, 1.0)
        return np.sqrt(own + of_time_model)

    @property
    def _rho(self) -> float:
        return min(max(self.correlation, 0.0), _MOST_CORRELATED)

    @property
    def inflation(self) -> float:
        """By how much the correlation widens the variance of a mean over many iterations."""
        return (1 + self._rho) / (1 - self._rho)


EXACT = IterationTimeError()
"""The errors of an exact model."""
