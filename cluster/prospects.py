"""What the fluid model says of a model's replicas together: now, with one replica more or less, or with other values.

Every figure is a plan of `scheduler.tuning.fluid_plan` with the controller's own estimates of one replica, the one of
which most is known, at an equal share of the traffic; no other formula is in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from scheduler.messages import Telemetry
from scheduler.model.fluid import finite_or_none
from scheduler.thresholds import EngineLimits
from scheduler.tuning.fluid_plan import FluidPlan
from scheduler.tuning.replica_model import ReplicaModel
from scheduler.tuning.scaler import best_known
from scheduler.tuning.slo import Slo


class NothingKnown(ValueError):
    """No replica of the model has reported anything yet, or none is tuned; the message says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """Values to plan for; a field that is None keeps the present one.

    max_running, token_budget: of thresholds, per replica; released: those of the configuration in place of the active
    ones. replicas: number of engines that share the traffic. rate_rps:
    requests per second, in all.
    """

    targets: Slo | None = None
    max_running: int | None = None
    token_budget: int | None = None
    released: bool = False
    replicas: int | None = None
    rate_rps: float | None = None


PRESENT = Values()


class Prospects:
    """The replicas of one model. models: the estimates of each engine that has reported."""

    def __init__(self, models: Sequence[ReplicaModel]) -> None:
        known = [one for one in models if one.telemetry is not None]
        best = best_known(known)
        if best is None:
            raise NothingKnown("no replica has reported yet; ask again after a control cycle")
        self._known = best
        self._replicas, self._rate_rps = len(known), sum(one.rate_rps for one in known)

    def shown(self) -> dict[str, Any]:
        """JSON-ready: `now`, `one_more`, and `one_less` (None with a single replica), each as `planned` gives it."""
        less = self.planned(Values(replicas=self._replicas - 1)) if self._replicas > 1 else None
        more = self.planned(Values(replicas=self._replicas + 1))
        return {"now": self.planned(PRESENT), "one_more": more, "one_less": less}

    def planned(self, values: Values) -> dict[str, Any]:
        """The plan for these values, JSON-ready.

        replicas; offered_rps, capacity_rps, goodput_rps: requests per second of all together (capacity None: unlimited,
        or not known); bottleneck, limit: see `FluidPlan`; load: ρ of the plan; in_time: share of the requests that can
        meet every target; running: requests in one replica at capacity; queue_limit: most that wait in one;
        memory_tokens: M* of one, of kv_capacity_tokens; iteration_s: seconds of an iteration at this load; cold: the
        lengths are a prior; reason: why a target cannot be met.
        """
        replicas = values.replicas or self._replicas
        rate_rps = self._rate_rps if values.rate_rps is None else values.rate_rps
        telemetry = self._known.telemetry
        assert telemetry is not None
        plan = self._known.plan_for(rate_rps / replicas, values.targets, self._limits(telemetry, values))
        assert plan is not None
        return {"replicas": replicas, "offered_rps": rate_rps, "cold": self._known.is_cold} | plan_shown(plan, replicas)

    def _limits(self, telemetry: Telemetry, values: Values) -> EngineLimits:
        """The engine's limits with what thresholds, the active or other ones, leave of them."""
        limits = telemetry.limits
        held = self._known.configured if values.released else telemetry.thresholds
        most = values.max_running or held.max_running or limits.max_num_seqs
        budget = values.token_budget or held.token_budget or limits.max_num_batched_tokens
        return replace(
            limits, max_num_seqs=min(limits.max_num_seqs, most),
            max_num_batched_tokens=min(limits.max_num_batched_tokens, budget),
        )


def plan_shown(plan: FluidPlan, replicas: int) -> dict[str, Any]:
    """The figures of `replicas` equal replicas that each follow this plan, JSON-ready; see `Prospects.planned`."""
    params = plan.fluid
    return {
        "capacity_rps": finite_or_none(replicas * plan.capacity_rps), "goodput_rps": replicas * plan.goodput_rps,
        "bottleneck": plan.bottleneck, "limit": plan.limit, "load": finite_or_none(plan.load), "in_time": plan.in_time,
        "running": params.running_at_capacity, "queue_limit": params.queue_limit, "iteration_s": params.steady_s,
        "memory_tokens": finite_or_none(plan.equilibrium.memory_tokens),
        "kv_capacity_tokens": plan.equilibrium.kv_capacity_tokens,
        "reason": None if plan.alone_s is None else
        f"one request alone takes {1000 * plan.alone_s:.1f} ms a token, more than the TPOT target",
    }
