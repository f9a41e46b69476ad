"""What a control loop sees of replicas, and how that becomes a number of them."""

from __future__ import annotations

from scheduler.messages import Counters
from scheduler.tuning.scaler import Scaler, best_known, capacity_of
from scheduler.tuning.wanted_replicas import Capacity, ScalingTerms, Wanted

EACH = Capacity(4.0, "memory")


class Cluster:
    """Replicas of one engine each. Every look is five seconds after the one before."""

    def __init__(self) -> None:
        self.scaler, self.now_s, self.solved = Scaler(ScalingTerms(start_up_s=60.0)), 0.0, 0
        self.arrivals: dict[str, int] = {}

    def look(self, up: str, coming: str = "", each: int = 0) -> Wanted:
        self.now_s += 5
        for name in up:
            self.arrivals[name] = self.arrivals.get(name, 0) + each
        return self.scaler.look(
            self.now_s, {name: (name,) for name in up + coming},
            {name: ("1", Counters(arrivals=self.arrivals[name])) for name in up}, self._capacity,
        )

    def _capacity(self) -> Capacity | None:
        self.solved += 1
        return EACH


def test_requests_of_all_engines_are_one_load() -> None:
    cluster = Cluster()
    for _ in range(40):
        wanted = cluster.look("abc", each=20)
    assert wanted.offered_rps is not None and abs(wanted.offered_rps - 12) < 0.5
    assert wanted.replicas in (3, 4)


def test_a_start_is_timed_from_when_the_replica_is_there_until_its_engines_answer() -> None:
    cluster = Cluster()
    cluster.look("a", coming="z")
    for _ in range(4):
        cluster.look("a", coming="b")
    cluster.look("abz")
    assert cluster.scaler.start_ups_s == (20.0,), "of z, there when watching began, nobody knows since when"


def test_replicas_that_were_up_when_watching_began_and_silent_ones_are_not_timed() -> None:
    cluster = Cluster()
    cluster.look("ab")
    cluster.look("a", coming="b")
    cluster.look("ab")
    assert cluster.scaler.start_ups_s == ()


def test_while_no_engine_answers_the_time_that_is_counted_over_grows() -> None:
    cluster = Cluster()
    for _ in range(20):
        cluster.look("a", each=20)
    for _ in range(3):
        cluster.look("", coming="a")
    wanted = cluster.look("a", each=80)
    assert wanted.offered_rps is not None and abs(wanted.offered_rps - 4) < 0.5


def test_what_a_replica_takes_is_not_solved_at_every_look() -> None:
    cluster = Cluster()
    for _ in range(60):
        cluster.look("a", each=5)
    assert 8 <= cluster.solved <= 12


def test_nothing_is_known_without_an_engine() -> None:
    assert best_known([]) is None and capacity_of([]) is None
