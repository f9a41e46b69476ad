"""What the controller expects of a replica and how sure it is: the plan, and the estimates behind it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

from scheduler.estimation.intervals import CONFIDENCE, Estimate
from scheduler.model.fluid import finite_or_none
from scheduler.tuning.fluid_plan import FluidPlan

_OF_PLAN = ("bottleneck", "goodput_rps", "capacity_rps", "load", "in_time", "tpot_margin", "tpot_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """The plan and the estimates behind it; every interval covers with probability `CONFIDENCE`.

    miss_probability: share of requests that may miss the TPOT target.
    rate_rps: arrivals, in all and by type, alike for rate_since_s seconds, with the counts' dispersion (1: Poisson).
    prompt_tokens, output_tokens: means. survival_samples: the ended answers that the survival estimate rests on (with
    guesses, while cold), alike for survival_since_s seconds (None: since the beginning). iteration_error_std:
    relative, of one iteration, and its correlation with the next one's; iteration_s: mean of recent iterations, with
    their own standard deviation (None: too few seen). cold: True while lengths are (in part) guessed. delivery_s: from
    a first token in the engine until it has left the replica.
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

        `ttft_s` is the time for a first token with what a latency target leaves it, `queue_limit` how many requests may
        wait (None: any number). What is infinite becomes None.
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
