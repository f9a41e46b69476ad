"""How many equal replicas serve a rate with every request in time: a search over the plans of one replica.

No formula is in here: `scheduler.tuning.fluid_plan` says what one replica does at a rate, and each gets an equal share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scheduler.model.probability import ACCEPTED_MISSES
from scheduler.tuning.fluid_plan import FluidPlan

_PRECISION = 1e-3
_DOUBLINGS = 40
FIRST_TOKEN = "first token"
PlanAt = Callable[[float], FluidPlan]
"""The plan of one replica to which so many requests per second arrive."""


@dataclass(frozen=True, slots=True)
class Need:
    """replicas: the smallest number (None: none does). most_rps: requests per second that one replica takes with all in
    time; goodput_rps: of these, the ones in time; in_time: share of the requests that can be, on an idle replica.
    binds: what a replica runs out of beyond that: time, memory, slots, token budget or first token. limit: of these,
    what sets its capacity. reason: in words, why there is no such number, or which requests are late on any.
    """

    replicas: int | None
    most_rps: float
    goodput_rps: float
    in_time: float
    binds: str
    limit: str
    reason: str | None


def replicas_needed(plan_at: PlanAt, rate_rps: float, *, miss_probability: float = ACCEPTED_MISSES) -> Need:
    """The smallest number of replicas with which all but `miss_probability` of the requests are in time.

    A replica must be below capacity, by as much as bursts need (`FluidPlan.late`). Requests that an idle replica would
    serve too late are no reason for more.
    """
    idle = plan_at(rate_rps * _PRECISION)
    if reason := _impossible(idle):
        in_time = 0.0 if idle.alone_s is not None else idle.in_time
        return Need(None, 0.0, 0.0, in_time, resource(idle), resource(idle), reason)

    def fails(rate: float) -> str:
        plan = plan_at(rate)
        if plan.load >= 1:
            return resource(plan)
        late = max(idle.in_time - plan.in_time, plan.late)
        return FIRST_TOKEN if late > miss_probability else ""

    most_rps, binds = _most(fails, idle.capacity_rps if math.isfinite(idle.capacity_rps) else rate_rps)
    reason = _late_on_any(idle, miss_probability)
    if most_rps <= 0:
        said = f"a replica that has almost nothing to do fails already: {binds} binds"
        return Need(None, 0.0, 0.0, idle.in_time, binds, resource(idle), said)
    replicas = max(1, math.ceil(rate_rps / most_rps)) if math.isfinite(most_rps) else 1
    if replicas > 1 and not fails(rate_rps / (replicas - 1)):  # within the search's precision
        replicas -= 1
    limit = resource(plan_at(most_rps)) if math.isfinite(most_rps) else binds
    return Need(replicas, most_rps, most_rps * idle.in_time, idle.in_time, binds, limit, reason)


def _most(fails: Callable[[float], str], near_rps: float) -> tuple[float, str]:
    """The highest rate that does not fail, and what fails beyond it."""
    low, high, doublings = 0.0, near_rps, 0
    while not fails(high):
        low, high, doublings = high, 2 * high, doublings + 1
        if doublings > _DOUBLINGS:
            return math.inf, "nothing"
    while high - low > _PRECISION * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fails(middle) else (middle, high)
        if high < 1e-12 * near_rps:
            return 0.0, fails(high)
    return low, fails(high)


def _impossible(idle: FluidPlan) -> str | None:
    if idle.alone_s is not None:
        return (
            f"one request alone takes {1000 * idle.alone_s:.1f} ms a token, more than the TPOT target of "
            f"{1000 * (idle.tpot_s or 0):g} ms"
        )
    if idle.capacity_rps <= 0:
        return idle.equilibrium.reason or "one replica can serve no request within the TPOT target"
    if idle.in_time <= 0:
        return "no request can be in time, even on an idle replica: its first token or its answer alone takes too long"
    return None


def _late_on_any(idle: FluidPlan, miss_probability: float) -> str | None:
    if 1 - idle.in_time <= miss_probability:
        return None
    return f"{1 - idle.in_time:.1%} of the requests are late even on an idle replica; more replicas do not help these"


def resource(plan: FluidPlan) -> str:
    """What sets the capacity: time, memory, slots or token budget."""
    if plan.limit == "TPOT target" or (plan.limit == "memory" and plan.equilibrium.limit == "compute"):
        return "time"
    return plan.limit
