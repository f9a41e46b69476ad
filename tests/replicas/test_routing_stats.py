"""How much room a replica says it has, and how a router reads it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from replicas import routing_stats
from replicas.routing_stats import RoutingStats
from router.ranking import best_first
from scheduler.fluid_params import FluidParams
from scheduler.messages import Gauges, Stats
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.survival import Survival
from scheduler.thresholds import EngineLimits, Thresholds

LIMITS = EngineLimits(
    kv_capacity_tokens=1000, block_tokens=16, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=512
)


def of_engine(thresholds: Thresholds, limits: EngineLimits = LIMITS, **gauges: int) -> Stats:
    return Stats.of_engine("e", limits, thresholds, Gauges(**gauges))


GAUGES = {"running": 6, "waiting": 3, "held": 2, "kv_used_tokens": 250}


@pytest.mark.parametrize(("cap", "slots"), [(None, 64), (12, 12)])
def test_slots_are_the_active_cap_or_the_engine_s_own(cap: int | None, slots: int) -> None:
    stats = of_engine(Thresholds(version=4, max_running=cap), **GAUGES)
    assert (stats.slots, stats.thresholds_version, stats.kv_used_fraction) == (slots, 4, 0.25)
    assert RoutingStats.of_engines([stats]) == RoutingStats(slots=slots, occupied=9, kv_used_fraction=0.25)


@pytest.mark.parametrize(
    ("fields", "slots"),
    [({"capacity_rps": 2.0, "iteration_s": 0.05}, 10), ({"capacity_rps": 1.0, "iteration_s": 0.05}, 5),
     ({"capacity_rps": 200.0, "iteration_s": 0.05}, 64), ({"capacity_rps": 2.0}, 64), ({"iteration_s": 0.05}, 64)],
)
def test_under_fluid_slots_are_what_runs_at_capacity(fields: dict[str, float], slots: int) -> None:
    """Little's law: half the capacity, half the slots, so that a slow replica counts as full sooner."""
    params = FluidParams(
        time_model=IterationTimeModel(0.01, 1e-6),
        survival=Survival(((0, 1.0), (98, 1.0), (99, 0.0))),
        kv_limit_tokens=1000,
        **fields,
    )
    assert of_engine(Thresholds(policy="fluid", fluid=params)).slots == slots


def test_the_ranks_of_a_replica_are_one_room() -> None:
    larger = replace(LIMITS, kv_capacity_tokens=3000)
    full = of_engine(Thresholds(max_running=4), larger, running=4, waiting=9, kv_used_tokens=750)
    stats = RoutingStats.of_engines([of_engine(Thresholds(max_running=12), **GAUGES), full])
    assert stats == RoutingStats(slots=16, occupied=22, kv_used_fraction=0.25)


def test_slack_is_the_share_of_free_slots() -> None:
    stats = RoutingStats(slots=10, occupied=4, kv_used_fraction=0.0)
    assert stats.slack(0) == pytest.approx(0.6)
    assert stats.slack(7) == pytest.approx(0.3)  # the router sent more than the engine had seen
    assert stats.slack(15) == pytest.approx(-0.5)


def test_stats_survive_the_way_through_serve() -> None:
    stats = RoutingStats(slots=10, occupied=4, kv_used_fraction=0.5)
    carried = json.loads(json.dumps({"other": 1} | stats.as_dict()))
    assert RoutingStats.from_dict(carried) == stats


@pytest.mark.parametrize(
    "reported",
    [{}, {"other": 1}, {"headrace": None}, {"headrace": 3}, {"headrace": {}}, {"headrace": {"slots": 1}},
     {"headrace": {"slots": 1, "occupied": 0, "kv_used_fraction": 0.0, "of_another_version": 1}}],
)
def test_what_is_not_ours_is_unknown(reported: dict[str, Any]) -> None:
    assert RoutingStats.from_dict(reported) is None


def test_a_replica_of_another_version_is_named_in_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    routing_stats._warn_once.cache_clear()
    for _ in range(3):
        assert RoutingStats.from_dict({"headrace": {"slots": 1, "of_another_version": 1}}) is None
    (record,) = caplog.records
    assert "of_another_version, slots" in record.getMessage()


def ranked(
    stats: dict[str, RoutingStats | None], ongoing: dict[str, int] | None = None, *, shuffled: str = ""
) -> str:
    """The replicas' one-letter names, best first; `shuffled` is the order that the shuffle leaves."""
    def shuffle(replicas: list[str]) -> None:
        assert sorted(replicas) == sorted(stats)
        replicas[:] = shuffled or sorted(replicas)

    return "".join(best_first(sorted(stats), stats.get, lambda name: (ongoing or {}).get(name, 0), shuffle))


def slots(free: int, of: int = 10) -> RoutingStats:
    return RoutingStats(slots=of, occupied=of - free, kv_used_fraction=0.0)


def test_most_slack_comes_first() -> None:
    assert ranked({"a": slots(2), "b": slots(9), "c": slots(5)}) == "bca"
    assert ranked({"a": slots(4), "b": slots(30, of=100)}) == "ab", "the share of free slots, not their number"


def test_what_the_router_sent_since_counts() -> None:
    stats: dict[str, RoutingStats | None] = {"a": slots(8), "b": slots(6)}
    assert ranked(stats) == "ab"
    assert ranked(stats, {"a": 7}) == "ba"
    assert ranked(stats, {"a": 2, "b": 4}) == "ab", "those the engine has reported already"


def test_who_has_not_reported_comes_last_the_least_busy_first() -> None:
    stats: dict[str, RoutingStats | None] = {"a": None, "b": slots(0), "c": None, "d": slots(5)}
    assert ranked(stats, {"a": 4, "c": 3}) == "dbca"
    assert ranked(stats, {"a": 1, "b": 15, "c": 0}) == "dbca", "even before one with a queue"


@pytest.mark.parametrize("order", ["abc", "bca", "cab"])
def test_equal_slack_falls_as_shuffled(order: str) -> None:
    assert ranked({"a": slots(5), "b": slots(5), "c": slots(50, of=100)}, shuffled=order) == order
    assert ranked({"a": None, "b": None, "c": None}, shuffled=order) == order
    assert ranked({"a": slots(5), "b": slots(5), "c": slots(9)}, shuffled=order)[0] == "c"


def test_the_replicas_given_stay_in_their_order() -> None:
    replicas = ["a", "b", "c"]
    best_first(replicas, lambda _: None, lambda _: 0, lambda copy: copy.reverse())
    assert replicas == ["a", "b", "c"]
