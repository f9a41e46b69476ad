"""How many replicas: from the offered load, what one takes, and two stated costs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scheduler.tuning.wanted_replicas import Capacity, ScalingTerms, Wanted, WantedReplicas

BIN_S, EACH = 5.0, Capacity(4.0, "memory")


class Watched:
    """A decision that sees a Poisson load, in five-second looks."""

    def __init__(self, *, seed: int = 1, present: int = 3, **terms: float) -> None:
        self.decision = WantedReplicas(ScalingTerms(**{"start_up_s": 60.0, **terms}))
        self._rng, self.now_s, self.present = np.random.default_rng(seed), 0.0, present

    def goes_on(self, rate_rps: float, seconds: float) -> Wanted:
        for _ in range(int(seconds / BIN_S)):
            self.now_s += BIN_S
            self.decision.observe(self.now_s, BIN_S, float(self._rng.poisson(rate_rps * BIN_S)))
            wanted = self.decision.decide(self.now_s, EACH, self.present)
            self.present = wanted.replicas
        return wanted


def test_the_smallest_number_that_takes_the_load_with_headroom() -> None:
    wanted = Watched().goes_on(10.0, 1200)
    assert wanted.replicas == 3, "10 requests/s and some headroom, 4 each"
    assert wanted.high_rps is not None and 10 < wanted.high_rps < 12
    assert "rejected ones included" in wanted.reason and "memory" in wanted.reason


def test_what_a_late_request_costs_is_the_headroom() -> None:
    cheap, dear = (Watched(late_costs_requests=cost).goes_on(10.0, 1200).high_rps for cost in (2.0, 1000.0))
    assert cheap is not None and dear is not None and cheap < 10.3 and dear > cheap + 1
    assert ScalingTerms(late_costs_requests=2.0).confidence == 0.5


def test_more_at_once_and_fewer_only_after_a_start_up_time() -> None:
    watched = Watched()
    watched.goes_on(10.0, 600)
    up = watched.goes_on(30.0, 15)
    assert up.replicas >= 8, "a step of three times is known within three looks"
    assert watched.goes_on(30.0, 300).replicas in (8, 9)
    held = watched.goes_on(10.0, 40)
    assert held.replicas >= 8 > held.needed and "stay so long" in held.reason
    assert watched.goes_on(10.0, 120).replicas == 3


def test_a_replica_that_comes_up_slowly_is_asked_for_early() -> None:
    """The same rising load, seen at the same time: the longer a start takes, the more are wanted now."""
    def asked(start_up_s: float) -> int:
        watched = Watched(start_up_s=start_up_s)
        for step in range(60):
            wanted = watched.goes_on(5 + step * 0.5, 10)
        return wanted.replicas

    assert asked(30.0) + 1 < asked(180.0)


def test_the_measured_start_up_time_replaces_the_assumed_one() -> None:
    decision = WantedReplicas(ScalingTerms(start_up_s=120.0))
    assert decision.start_up_s == 120
    decision.came_up(0.0, 30.0)
    decision.came_up(0.0, 45.0)
    decision.came_up(0.0, 7000.0)
    assert decision.start_up_s == 45, "one that waited long for a node does not count for more than another"
    for _ in range(5):
        decision.came_up(0.0, 20.0)
    assert decision.start_up_s == 20 and len(decision.start_ups_s) == 5
    again = WantedReplicas(ScalingTerms(start_up_s=120.0), decision.start_ups_s)
    assert again.start_up_s == 20


def test_the_last_one_goes_when_keeping_it_has_cost_what_a_late_request_and_a_start_cost() -> None:
    watched = Watched(present=1)
    watched.goes_on(2.0, 300)
    assert watched.goes_on(0.0, 20).replicas == 1
    assert watched.goes_on(0.0, 130).replicas == 0  # 60 s, 10 requests / 4 a second, and 60 s that any is held
    assert "nobody has asked" in watched.decision.decide(watched.now_s, EACH, 0).reason
    assert watched.goes_on(0.5, 20).replicas == 1


def test_a_first_replica_that_somebody_waited_for_stays_for_the_next_request() -> None:
    """What waited was at the engine before its counters were known, so nothing of it is counted."""
    watched = Watched(present=1)
    watched.goes_on(2.0, 60)
    assert watched.goes_on(0.0, 300).replicas == 0
    watched.decision.came_up(watched.now_s, 60.0)
    assert watched.goes_on(0.0, 20).replicas == 1
    assert watched.goes_on(0.0, 120).replicas == 0


@pytest.mark.parametrize(("capacity", "said"), [
    (None, "not known yet"), (Capacity(0.0, "the TPOT target is too short"), "the TPOT target is too short"),
])
def test_as_many_as_there_are_while_no_number_follows(capacity: Capacity | None, said: str) -> None:
    decision = WantedReplicas(ScalingTerms())
    decision.observe(5.0, 5.0, 100.0)
    wanted = decision.decide(5.0, capacity, 4)
    assert wanted.replicas == 4 and said in wanted.reason
    assert wanted.as_dict()["replicas"] == 4


def test_a_watcher_that_starts_anew_takes_nothing_away_at_first() -> None:
    watched = Watched(present=9)
    assert watched.goes_on(10.0, 30).replicas == 9
    assert watched.goes_on(10.0, 300).replicas == 3


def test_one_is_enough_for_a_replica_without_limit() -> None:
    decision = WantedReplicas(ScalingTerms())
    decision.observe(5.0, 5.0, 1e6)
    wanted = decision.decide(5.0, Capacity(math.inf, "nothing"), 1)
    assert wanted.replicas == 1 and wanted.each_rps is None
