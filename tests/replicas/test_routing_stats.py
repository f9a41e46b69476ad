"""How much room a replica says it has, and how a router reads it."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from typing import Any

import pytest

from replicas import routing_stats
from replicas.marks import LatestMarks, Marks
from replicas.routing_stats import ReadReports, RoutingStats
from scheduler.fluid_params import FluidParams
from scheduler.messages import Gauges, Outlook, Stats
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
    assert RoutingStats.of_engines([stats]) == RoutingStats(
        slots=slots, occupied=9, kv_used_fraction=0.25, kv_capacity_tokens=1000,
    )


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
    assert stats == RoutingStats(slots=16, occupied=22, kv_used_fraction=0.25, kv_capacity_tokens=4000)


def test_slack_is_the_share_of_free_slots() -> None:
    stats = RoutingStats(slots=10, occupied=4, kv_used_fraction=0.0)
    assert stats.slack(4) == pytest.approx(0.6)
    assert stats.slack(15) == pytest.approx(-0.5)


@pytest.mark.parametrize("outlook", [None, Outlook(0.5, 1e-4, 0.02, 1e-5, 0.05, 120.0)])
def test_stats_survive_the_way_through_serve(outlook: Outlook | None) -> None:
    stats = RoutingStats(slots=10, occupied=4, kv_used_fraction=0.5, room=3, outlook=outlook, at_s=12.5)
    carried = json.loads(json.dumps({"other": 1} | stats.as_dict()))
    assert RoutingStats.from_dict(carried) == stats
    assert type(stats.as_dict()["headrace"]["outlook"]) in (tuple, type(None)), "nothing of ours in a pickle of it"


def test_marks_survive_the_way_through_serve_and_its_controller_needs_nothing_of_ours() -> None:
    latest = LatestMarks()
    latest.note(range(30))
    stats = RoutingStats(slots=10, occupied=4, kv_used_fraction=0.5, marks=latest.told())
    carried = pickle.dumps({"other": 1} | stats.as_dict())
    assert b"replicas" not in carried
    assert RoutingStats.from_dict(pickle.loads(carried)) == stats


def test_a_report_without_marks_or_with_something_else_is_read() -> None:
    stats = RoutingStats(slots=10, occupied=4, kv_used_fraction=0.5)
    assert "headrace_marks" not in stats.as_dict()
    for wrong in (None, 3, "text", [1], (1, "text"), (1, b"x"), {"number": 1}):
        assert RoutingStats.from_dict(stats.as_dict() | {"headrace_marks": wrong}) == stats
    told = replace(stats, marks=Marks(1, b"abcdef"))
    assert told.as_dict()["headrace"].keys() == stats.as_dict()["headrace"].keys(), "a release before marks reads this"


def test_each_report_is_read_once() -> None:
    reports, one = ReadReports(), RoutingStats(slots=10, occupied=4, kv_used_fraction=0.5)
    first, another = one.as_dict(), replace(one, occupied=5).as_dict()
    assert reports.of("a", first) == one and reports.of("b", {}) is None
    assert reports.of("a", first) is reports.of("a", first)
    assert reports.of("a", another) == replace(one, occupied=5)
    reports.keep(["b"])
    assert reports._read.keys() == {"b"}


def test_engines_that_share_the_requests_of_a_replica_have_one_outlook() -> None:
    one = replace(of_engine(Thresholds()), outlook=Outlook(1.0, 2e-4, 0.02, 2e-5, 0.05, 100.0), room=2)
    other = replace(one, outlook=Outlook(3.0, 4e-4, 0.04, 4e-5, 0.05, 200.0), room=5)
    together = RoutingStats.of_engines([one, other], at_s=7.0)
    assert together.outlook == pytest.approx(Outlook(2.0, 1.5e-4, 0.03, 1.5e-5, 0.05, 150.0))
    assert (together.room, together.at_s) == (7, 7.0)
    assert RoutingStats.of_engines([one, replace(other, room=None, outlook=None)]).room is None
    assert RoutingStats.of_engines([one, replace(other, outlook=None)]).outlook is None


@pytest.mark.parametrize(
    "reported",
    [{}, {"other": 1}, {"headrace": None}, {"headrace": 3}, {"headrace": {}}, {"headrace": {"slots": 1}},
     {"headrace": {"slots": 1, "occupied": 0, "kv_used_fraction": 0.0, "of_another_version": 1}},
     *({"headrace": {"slots": 1, "occupied": 0, "kv_used_fraction": 0.0} | wrong} for wrong in (
         {"slots": 0}, {"at_s": "x"}, {"outlook": "abcdef"}, {"outlook": [1.0, 2.0]}, {"occupied": None},
         {"kv_used_fraction": float("nan")}, {"slots": 10**400},
     ))],
)
def test_what_is_not_ours_is_unknown(reported: dict[str, Any]) -> None:
    assert RoutingStats.from_dict(reported) is None


def test_a_replica_of_another_version_is_named_in_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    routing_stats._warn_once.cache_clear()
    for _ in range(3):
        assert RoutingStats.from_dict({"headrace": {"slots": 1, "of_another_version": 1}}) is None
    (record,) = caplog.records
    assert "of_another_version, slots" in record.getMessage()
