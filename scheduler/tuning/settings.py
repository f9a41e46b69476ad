"""The controller's settings for tuning a replica."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.model.probability import ACCEPTED_MISSES
from scheduler.tuning.slo import NO_SLO, Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningSettings:
    """Settings for one replica's thresholds.

    window_s: seconds of arrivals that count. min_finished: finished requests before thresholds are changed.
    overflow_probability: accepted probability that memory overflows or that a request misses its TPOT target.
    validity_s: seconds for which thresholds stay active unless renewed. targets: the latency targets (SLO).
    """

    window_s: float = 60.0
    min_finished: int = 20
    overflow_probability: float = ACCEPTED_MISSES
    validity_s: float = 120.0
    targets: Slo = NO_SLO
