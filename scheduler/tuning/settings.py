"""What the controller is told: how a replica is to be tuned."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.tuning.slo import NO_SLO, Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningSettings:
    """How one replica's thresholds are set.

    window_s: seconds of arrivals that count; min_finished: finished requests to see before thresholds are touched;
    overflow_probability: accepted chance that memory overflows or that a request misses its time per token; validity_s:
    how long thresholds stay active unless renewed; targets: the latencies that requests are to be kept within.
    """

    window_s: float = 60.0
    min_finished: int = 20
    overflow_probability: float = 0.01
    validity_s: float = 120.0
    targets: Slo = NO_SLO
