"""Error statistics of recent iteration-time predictions, from exponentially weighted sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scheduler.estimation.iteration_time_error import IterationTimeError

_NO_VARIANCE = 1e-20
_SUMS = (
    "weight", "error_sum", "error_square", "share", "seconds", "seconds_square", "residual_square", "lagged",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorStatistics:
    """Weighted sums over predictions, each made before its record was learned from.

    weight: of all records. Sums of relative errors (measured − predicted)/predicted, of their squares, of products with
    the previous error (`lagged`), and of |measured − predicted|/measured (`share`). Sums of measured seconds, of their
    squares, and of squares of measured − predicted (`residual_square`). The caller bounds the errors.
    """

    weight: float = 0.0
    error_sum: float = 0.0
    error_square: float = 0.0
    share: float = 0.0
    seconds: float = 0.0
    seconds_square: float = 0.0
    residual_square: float = 0.0
    lagged: float = 0.0
    last_error: float = 0.0

    @classmethod
    def of_sums(cls, sums: Sequence[float]) -> ErrorStatistics:
        """From `sums`, or from the sum of several engines'."""
        return cls(**dict(zip(_SUMS, sums, strict=True)))

    @property
    def sums(self) -> tuple[float, ...]:
        """All that adds up over engines, in the order of the fields."""
        return tuple(getattr(self, name) for name in _SUMS)

    def with_prediction(self, predicted_s: float, error: float, forgetting: float) -> ErrorStatistics:
        """The statistics with one more record, all earlier ones weighted by `forgetting`."""
        counted_s = predicted_s * (1 + error)
        residual_s = counted_s - predicted_s
        share = min(abs(residual_s) / counted_s, 1.0) if counted_s > 0 else 1.0
        return ErrorStatistics(
            weight=self.weight * forgetting + 1.0,
            error_sum=self.error_sum * forgetting + error,
            error_square=self.error_square * forgetting + error**2,
            share=self.share * forgetting + share,
            seconds=self.seconds * forgetting + counted_s,
            seconds_square=self.seconds_square * forgetting + counted_s**2,
            residual_square=self.residual_square * forgetting + residual_s**2,
            lagged=self.lagged * forgetting + error * self.last_error,
            last_error=error,
        )

    def with_times_scaled(self, factor: float, last_error: float) -> ErrorStatistics:
        """The statistics with all measured and predicted seconds scaled by `factor`; relative errors stay."""
        return replace(
            self, seconds=self.seconds * factor, seconds_square=self.seconds_square * factor**2,
            residual_square=self.residual_square * factor**2, last_error=last_error,
        )

    @property
    def mape(self) -> float:
        """Mean |measured − predicted| / measured."""
        return self.share / self.weight

    @property
    def error(self) -> IterationTimeError:
        """Mean, standard deviation and correlation of the relative errors."""
        if not self.weight:
            return IterationTimeError(iterations=0.0)
        mean = self.error_sum / self.weight
        variance = max(self.error_square / self.weight - mean**2, 0.0)
        correlation = (self.lagged / self.weight - mean**2) / variance if variance > _NO_VARIANCE else 0.0
        return IterationTimeError(mean, math.sqrt(variance), min(max(correlation, -1.0), 1.0), self.weight)

    @property
    def iteration_time_s(self) -> tuple[float, float]:
        """Mean and standard deviation of the iterations' seconds."""
        mean = self.seconds / self.weight
        return mean, math.sqrt(max(self.seconds_square / self.weight - mean**2, 0.0))

    @property
    def r2(self) -> float | None:
        """Predicted share of the variance of iteration times; None without variance."""
        mean, square = self.seconds / self.weight, self.seconds_square / self.weight
        variance = square - mean**2
        return 1 - self.residual_square / self.weight / variance if variance > 1e-12 * square else None
