"""The controller's plan for a replica and the estimates behind it, with intervals, as `status` shows them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from scheduler.estimation.intervals import CONFIDENCE, Estimate
from scheduler.model.fluid import finite_or_none
from scheduler.tuning.fluid_plan import FluidPlan

_OF_PLAN = ("bottleneck", "limit", "goodput_rps", "capacity_rps", "load", "in_time", "tpot_margin", "tpot_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The plan and the estimates behind it; every interval covers with probability `CONFIDENCE`.

    miss_probability: share of requests that may miss the TPOT target.
    rate_rps: arrivals in all and by type, unchanged for rate_since_s seconds; dispersion of their counts (1: Poisson).
    prompt_tokens, output_tokens: means.
    survival_samples: ended outputs behind the survival estimate (with priors, while cold), unchanged for
        survival_since_s seconds (None: since the start).
    iteration_error_std: relative error of one iteration, with the correlation of successive errors.
    iteration_s: mean of recent iterations, with their standard deviation (None: too few).
    cold: True while lengths are (partly) a prior.
    delivery_s: seconds from a first token in the engine until it has left the replica.
    """

    plan: FluidPlan
    miss_probability: float
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
        """JSON-ready and flat: the plan's figures beside the estimates, an estimate as {"value", "low", "high"}.

        ttft_s: time for a first token within all targets; queue_limit: most waiting requests (None: unlimited).
        Infinite values become None.
        """
        plan = {name: getattr(self.plan, name) for name in _OF_PLAN}
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "plan"}
        params = self.plan.fluid
        finite: dict[str, Any] = _finite(
            plan | {"ttft_s": params.first_token_limit_s, "queue_limit": params.queue_limit} | own
            | {"confidence": CONFIDENCE}
        )
        return finite


def _finite(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _finite(asdict(value))
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return finite_or_none(value) if isinstance(value, float) else value
