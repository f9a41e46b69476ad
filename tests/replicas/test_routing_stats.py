"""How much room a replica says it has, and how a router reads it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from replicas.routing_stats import RoutingStats
from scheduler.messages import Counters, Gauges, Telemetry
from scheduler.thresholds import EngineLimits, Thresholds

LIMITS = EngineLimits(
    kv_capacity_tokens=1000, block_tokens=16, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=512
)


def telemetry(thresholds: Thresholds) -> Telemetry:
    return Telemetry(
        engine_id="e", clock_s=0.0, cursor=0, limits=LIMITS, thresholds=thresholds, from_config=True,
        gauges=Gauges(in_service=6, waiting=3, held=2, kv_used_tokens=250), counters=Counters(),
    )


@pytest.mark.parametrize(("cap", "seats"), [(None, 64), (12, 12)])
def test_seats_are_the_cap_in_force_or_the_engine_s_own(cap: int | None, seats: int) -> None:
    stats = RoutingStats.from_telemetry(telemetry(Thresholds(max_in_service=cap)))
    assert stats == RoutingStats(seats=seats, occupied=9, kv_used_fraction=0.25)


def test_slack_is_the_share_of_free_seats() -> None:
    stats = RoutingStats(seats=10, occupied=4, kv_used_fraction=0.0)
    assert stats.slack(0) == pytest.approx(0.6)
    assert stats.slack(7) == pytest.approx(0.3)  # the router sent more than the engine had seen
    assert stats.slack(15) == pytest.approx(-0.5)


def test_stats_survive_the_way_through_serve() -> None:
    stats = RoutingStats(seats=10, occupied=4, kv_used_fraction=0.5)
    carried = json.loads(json.dumps({"other": 1} | stats.as_dict()))
    assert RoutingStats.from_dict(carried) == stats


@pytest.mark.parametrize(
    "reported",
    [{}, {"other": 1}, {"headrace": None}, {"headrace": 3}, {"headrace": {}}, {"headrace": {"seats": 1}},
     {"headrace": {"seats": 1, "occupied": 0, "kv_used_fraction": 0.0, "of_another_version": 1}}],
)
def test_what_is_not_ours_is_unknown(reported: dict[str, Any]) -> None:
    assert RoutingStats.from_dict(reported) is None
