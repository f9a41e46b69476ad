"""What the errors of an iteration-time model say once there are enough of them."""

from __future__ import annotations

from scheduler.estimation.error_statistics import ErrorStatistics
from scheduler.estimation.iteration_time_error import PUBLISHED_MAPE, IterationTimeError
from scheduler.estimation.iteration_time_fit import MIN_RECORDS


class MeasuredErrors:
    """Of a model that counts its `records` and keeps the `statistics` of its recent predictions."""

    __slots__ = ()
    records: int

    @property
    def statistics(self) -> ErrorStatistics:
        """The errors of recent predictions, however few."""
        raise NotImplementedError

    @property
    def _known(self) -> ErrorStatistics | None:
        return self.statistics if self.records >= MIN_RECORDS and self.statistics.weight else None

    @property
    def mape(self) -> float | None:
        """Mean |measured − predicted| / measured of recent predictions, a fraction; None before 32 records."""
        return self._known.mape if self._known else None

    @property
    def error(self) -> IterationTimeError:
        """Prediction errors of recent iterations; before 32 records, the published prior."""
        return self._known.error if self._known else IterationTimeError.from_mape(PUBLISHED_MAPE)

    @property
    def iteration_time_s(self) -> tuple[float, float] | None:
        """Mean and standard deviation of recent iterations' seconds; None before 32 records."""
        return self._known.iteration_time_s if self._known else None

    @property
    def r2(self) -> float | None:
        """Predicted share of the variance of recent times; None before 32 records or without variance."""
        return self._known.r2 if self._known else None
