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
        self.under_way = 0

    def look(self, up: str, coming: str = "", each: int = 0) -> Wanted:
        self.now_s += 5
        for name in up:
            self.arrivals[name] = self.arrivals.get(name, 0) + each
        return self.scaler.look(
            self.now_s, {name: (name,) for name in up + coming},
            {name: ("1", self._counters(name)) for name in up}, self._capacity,
        )

    def _counters(self, name: str) -> Counters:
        return Counters(arrivals=self.arrivals[name], completed=self.arrivals[name] - self.under_way)

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


def test_silent_engines_are_not_idle_ones() -> None:
    """Ten busy replicas were scaled to none while their reports were late, and started again."""
    cluster = Cluster()
    for _ in range(40):
        loaded = cluster.look("abc", each=20)
    silent = [cluster.look("", coming="abc") for _ in range(3 * 60 // 5)]
    assert min(one.replicas for one in silent) >= loaded.replicas
    for _ in range(60):
        idle = cluster.look("abc")
    assert idle.replicas == 0, "these say that they have nothing to do"


def test_requests_are_counted_when_most_engines_have_answered() -> None:
    cluster = Cluster()
    for _ in range(60):
        cluster.look("abcd", each=20)
        for name in "abcd":
            cluster.arrivals[name] += 4
        cluster.now_s += 1
        wanted = cluster.scaler.look(  # one of them has something urgent to say
            cluster.now_s, {name: (name,) for name in "abcd"}, {"a": ("1", cluster._counters("a"))}, cluster._capacity
        )
    assert wanted.offered_rps is not None and abs(wanted.offered_rps - 16) < 1.5


def test_what_a_replica_takes_is_not_solved_at_every_look() -> None:
    cluster = Cluster()
    for _ in range(60):
        cluster.look("a", each=5)
    assert 8 <= cluster.solved <= 12


def test_requests_that_a_replica_had_before_its_first_report_are_counted() -> None:
    cluster = Cluster()
    for _ in range(40):
        cluster.look("")
    assert cluster.look("").replicas == 0
    wanted = cluster.look("a", each=6)
    assert wanted.replicas == 1 and wanted.offered_rps is not None and wanted.offered_rps > 0


def test_what_engines_had_before_watching_began_is_not_counted() -> None:
    cluster = Cluster()
    cluster.arrivals = {"a": 10_000, "b": 10_000}
    cluster.look("a", coming="b")
    for _ in range(5):
        wanted = cluster.look("ab", each=5)
    assert wanted.offered_rps is not None and wanted.offered_rps < 4


def test_while_a_request_runs_nobody_is_said_not_to_have_asked() -> None:
    cluster = Cluster()
    for _ in range(3):
        cluster.look("a", each=10)
    cluster.under_way = 1
    for _ in range(100):
        wanted = cluster.look("a")
    assert wanted.replicas == 1
    cluster.under_way = 0
    for _ in range(100):
        wanted = cluster.look("a")
    assert wanted.replicas == 0


def test_too_little_known_is_no_decision() -> None:
    scaler = Scaler(ScalingTerms(start_up_s=60.0))
    looked = [scaler.look(5.0 * n, {"a": ("a",)}, {"a": ("1", Counters())}, lambda: None) for n in range(3)]
    assert [(one.replicas, one.decided) for one in looked] == [(1, False)] * 3
    assert Cluster().look("a").decided is False and Cluster().look("").replicas == 0


def test_nothing_is_known_without_an_engine() -> None:
    assert best_known([]) is None and capacity_of([]) is None
