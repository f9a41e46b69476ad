"""One model's replicas as a control loop sees them, and how many there should be.

The cluster's controller and the simulated one both ask this object, so that they decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from scheduler.estimation.offered_counts import OfferedCounts
from scheduler.messages import Counters
from scheduler.tuning.fluid_plan import FluidPlan
from scheduler.tuning.replica_model import ReplicaModel
from scheduler.tuning.replicas_needed import replicas_needed
from scheduler.tuning.wanted_replicas import Capacity, ScalingTerms, Wanted, WantedReplicas

_CAPACITY_FOR_S = 30.0
"""Seconds for which what one replica takes is not solved again."""
_LEAST_RATE_RPS = 1e-3


class Scaler:
    """Counts what is offered, times replicas that come up, and decides. Times are seconds of one clock."""

    def __init__(self, terms: ScalingTerms, start_ups_s: Sequence[float] = ()) -> None:
        self._wanted = WantedReplicas(terms, start_ups_s)
        self._counts = OfferedCounts()
        self._looked_s: float | None = None
        self._capacity: Capacity | None = None
        self._solved_s = float("-inf")
        self._seen_s: dict[str, float] = {}
        self._up: set[str] = set()

    @property
    def start_ups_s(self) -> tuple[float, ...]:
        """Seconds that the latest replicas took to come up."""
        return self._wanted.start_ups_s

    def follow(self, terms: ScalingTerms) -> None:
        """Other terms from the next look on."""
        self._wanted.follow(terms)

    def look(
        self, now_s: float, replicas: Mapping[str, Collection[str]], engines: Mapping[str, tuple[str, Counters]],
        capacity: Callable[[], Capacity | None],
    ) -> Wanted:
        """What there should be now.

        replicas: by the name of each that is there or comes up, the names of its engines; without those that leave.
        engines: by name, the id and the counters of each that answered. capacity: of one replica; solved now and then.
        """
        self._time(now_s, replicas, engines)
        self._counts.begin({engine for of_it in replicas.values() for engine in of_it} | engines.keys())
        up = {engine for name in self._up for engine in replicas[name]}
        if 2 * len(up & engines.keys()) >= len(up):  # while few of them answer, the time that is counted over grows
            offered = self._counts.since_last(engines)
            if self._looked_s is not None:
                busy = any(counters.in_flight > 0 for _, counters in engines.values())
                self._wanted.observe(now_s, now_s - self._looked_s, offered, busy=busy)
            self._looked_s = now_s
        if self._capacity is None or now_s - self._solved_s >= _CAPACITY_FOR_S:
            self._capacity, self._solved_s = capacity() or self._capacity, now_s
        return self._wanted.decide(now_s, self._capacity, len(replicas))

    def _time(
        self, now_s: float, replicas: Mapping[str, Collection[str]], engines: Mapping[str, tuple[str, Counters]]
    ) -> None:
        """A replica has come up when its engines answer. One that does at the first look has not been watched, and of
        those that were there when watching began nobody knows since when."""
        first_look = self._looked_s is None and not self._seen_s
        for name, of_it in replicas.items():
            if name not in self._seen_s:
                self._seen_s[name] = float("-inf") if first_look else now_s
            if name not in self._up and of_it and all(engine in engines for engine in of_it):
                self._up.add(name)
                if float("-inf") < self._seen_s[name] < now_s:
                    self._wanted.came_up(now_s, now_s - self._seen_s[name])
        self._up &= replicas.keys()
        self._seen_s = {name: seen_s for name, seen_s in self._seen_s.items() if name in replicas}
        self._counts.keep({engine for of_it in replicas.values() for engine in of_it} | engines.keys())


def capacity_of(models: Sequence[ReplicaModel], engines: int = 1) -> Capacity | None:
    """What a replica of so many engines takes, by the estimates of the engine of which most is known; None while no
    engine has seen enough answers."""
    best = best_known(models)
    if best is None or best.is_cold:
        return None
    known = best

    def plan_at(rate_rps: float) -> FluidPlan:
        plan = known.plan_for(rate_rps)
        assert plan is not None
        return plan

    need = replicas_needed(
        plan_at, max(known.rate_rps, _LEAST_RATE_RPS), miss_probability=known.miss_probability
    )
    return Capacity(engines * need.most_rps, need.binds if need.replicas else str(need.reason))


def best_known(models: Sequence[ReplicaModel]) -> ReplicaModel | None:
    """The estimates of which most is known; None: no engine has reported."""
    known = [one for one in models if one.telemetry is not None]
    return max(known, key=lambda one: (not one.is_cold, one.finished_seen), default=None)
