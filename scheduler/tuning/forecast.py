"""What the controller expects of a replica and how sure it is: estimates with intervals, and what binds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from scheduler.estimation.intervals import CONFIDENCE, Estimate
from scheduler.model.fluid import finite_or_none


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The promise in force, and the estimates behind it; every interval covers with probability `CONFIDENCE`.

    bottleneck: memory, slots, token budget, TPOT target, TTFT target, latency target or nothing. goodput_rps:
    requests/s expected within all targets; capacity_rps: what could be served; load: what arrives, as a share of it.
    tpot_margin: how far below the target iterations stay, relative to them, so that all but miss_probability of
    requests meet it; in_time: share of requests whose lengths allow them to meet the targets at all. tpot_s, ttft_s:
    the targets, with what a latency target asks of both; queue_limit: how many may wait (None: any number).

    rate_rps: arrivals, in all and by type, alike for rate_since_s seconds, with the counts' dispersion (1: Poisson).
    prompt_tokens, output_tokens: means. survival_samples: the ended answers that the survival estimate rests on (with
    guesses, while cold), alike for survival_since_s seconds (None: since the beginning). iteration_error_std:
    relative, of one iteration, and its correlation with the next one's; iteration_s: mean of recent iterations, with
    their own standard deviation (None: too few seen). cold: True while lengths are (in part) guessed.
    """

    bottleneck: str
    goodput_rps: float
    capacity_rps: float
    load: float
    miss_probability: float
    in_time: float
    tpot_margin: float
    tpot_s: float | None
    ttft_s: float | None
    queue_limit: int | None
    rate_rps: Estimate
    rate_by_type_rps: dict[str, Estimate]
    rate_since_s: float
    dispersion: float
    prompt_tokens: Estimate
    output_tokens: Estimate
    survival_samples: float
    survival_since_s: float | None
    iteration_error_std: Estimate
    iteration_error_correlation: float
    iteration_s: Estimate | None
    iteration_std_s: float | None
    cold: bool
    delivery_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: an estimate becomes {"value", "low", "high"}; what is infinite becomes None."""
        data = asdict(self) | {"confidence": CONFIDENCE}
        finite: dict[str, Any] = _finite(data)
        return finite


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return finite_or_none(value) if isinstance(value, float) else value
