"""What the controller says beyond the state: its history, one replica more, and other values before they apply."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from fake_store import FakeStore
from test_control_loop import CONFIG, DEPLOYMENT, Cluster, cluster, new_loop, one_cycle, tuned

from cluster.controller import ControllerActor, ControlLoop
from cluster.prospects import NothingKnown, Prospects, Values
from scheduler.thresholds import Thresholds
from scheduler.tuning.replica_model import ReplicaModel
from scheduler.tuning.slo import Slo

__all__ = ["cluster"]
FLUID = Thresholds(policy="fluid")
TARGETS = Slo(ttft_s=2.0, tpot_s=0.05)


def loaded(cluster: Cluster, *, every_s: float = 0.25, targets: Slo = TARGETS) -> ControlLoop:
    """Two replicas after a minute of traffic and two cycles."""
    cluster.add("a")
    cluster.add("b")
    loop = new_loop(targets=targets, thresholds=FLUID)
    one_cycle(loop)
    cluster.traffic(every_s=every_s)
    one_cycle(loop)
    return loop


def overview(loop: ControlLoop) -> dict[str, Any]:
    found: dict[str, Any] = asyncio.run(loop.overview())
    return json.loads(json.dumps(found, allow_nan=False))  # type: ignore[no-any-return]


def model_of(loop: ControlLoop, name: str) -> ReplicaModel:
    model = loop._replicas[name].tuner.model
    assert model is not None
    return model


def test_the_plan_with_more_replicas_is_the_controller_s_own_at_a_smaller_share(cluster: Cluster) -> None:
    loop = loaded(cluster, every_s=0.01)
    found = overview(loop)["prospects"]["m"]
    forecast = loop.state()["replicas"]["a"]["forecast"]
    now = found["now"]
    assert now["capacity_rps"] == pytest.approx(2 * forecast["capacity_rps"])
    assert now["goodput_rps"] == pytest.approx(2 * forecast["goodput_rps"])
    assert now["offered_rps"] == pytest.approx(sum(model_of(loop, name).rate_rps for name in "ab"))
    alone = model_of(loop, "a").plan_for(now["offered_rps"] / 3)
    assert alone is not None
    assert found["one_more"]["goodput_rps"] == pytest.approx(3 * alone.goodput_rps)
    assert now["offered_rps"] > now["capacity_rps"], "overloaded, so that"
    assert found["one_more"]["goodput_rps"] > 1.3 * now["goodput_rps"] > 1.3 * found["one_less"]["goodput_rps"]
    assert [found[key]["replicas"] for key in ("now", "one_more", "one_less")] == [2, 3, 1]


def test_at_low_load_one_more_replica_adds_nothing(cluster: Cluster) -> None:
    found = overview(loaded(cluster, every_s=2.0))["prospects"]["m"]
    assert found["one_more"]["goodput_rps"] == pytest.approx(found["now"]["goodput_rps"])
    assert found["now"]["bottleneck"] == "nothing" and found["now"]["limit"] != ""


def test_one_replica_has_no_fewer(cluster: Cluster) -> None:
    cluster.add("a")
    loop = new_loop(targets=TARGETS, thresholds=FLUID)
    one_cycle(loop)
    assert overview(loop)["prospects"]["m"]["one_less"] is None


def test_prospects_are_solved_once_a_cycle_and_only_when_asked_for(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = []
    monkeypatch.setattr(Prospects, "shown", lambda self: solved.append(1) or {"now": {}})  # type: ignore[func-returns-value]
    loop = loaded(cluster)
    assert solved == []
    overview(loop)
    overview(loop)
    assert solved == [1]
    one_cycle(loop)
    overview(loop)
    assert solved == [1, 1]


def test_other_values_are_planned_for_and_change_nothing(cluster: Cluster) -> None:
    loop = loaded(cluster, every_s=0.01)
    before, offered = loop.state(), list(cluster.offered)
    answer = loop.predict("m", Values(targets=replace(TARGETS, tpot_s=0.02)))
    assert answer["then"]["capacity_rps"] < answer["now"]["capacity_rps"], "tighter targets, smaller batches"
    assert answer["then"]["limit"] == "TPOT target"
    slots = loop.predict("m", Values(max_running=2))["then"]
    assert slots["bottleneck"] == "slots" and slots["capacity_rps"] < answer["now"]["capacity_rps"]
    budget = loop.predict("m", Values(token_budget=4))["then"]
    assert budget["bottleneck"] == "token budget"
    assert loop.predict("m", Values(rate_rps=1.0))["then"]["goodput_rps"] == pytest.approx(1.0)
    assert loop.state() == before and cluster.offered == offered


def test_active_thresholds_hold_for_the_plan_until_they_are_released(cluster: Cluster) -> None:
    loop = loaded(cluster, every_s=0.01)
    free = loop.predict("m", Values())["now"]
    for name in "ab":
        cluster.operator(name, max_running=2, pinned=True)
    one_cycle(loop)
    answer = loop.predict("m", Values(released=True))
    assert answer["now"]["bottleneck"] == "slots"
    assert answer["then"]["capacity_rps"] == pytest.approx(free["capacity_rps"], rel=0.05)


def test_a_target_out_of_reach_is_said(cluster: Cluster) -> None:
    then = loaded(cluster).predict("m", Values(targets=Slo(tpot_s=0.0001)))["then"]
    assert "one request alone takes" in then["reason"]


def test_what_is_not_known_is_said_in_words(cluster: Cluster) -> None:
    loop = new_loop(thresholds=FLUID)
    with pytest.raises(NothingKnown, match="no replica has reported"):
        loop.predict("m", Values())
    cluster.add("a")
    counted = new_loop()
    one_cycle(counted)
    assert overview(counted)["prospects"]["m"] == "the policy nested_wait plans no goodput; fluid does"


def test_an_overview_has_recent_counts_and_the_latest_changes_without_long_curves(cluster: Cluster) -> None:
    loop = loaded(cluster)
    found = overview(loop)
    assert found["replicas"]["a"]["still_s"] == 0.0 and found["replicas"]["a"]["recent"]["seconds"] == 60.0
    (first, *_, last) = found["changes"]
    assert first["kind"] == "thresholds" and last["new"]["fluid"]["capacity_rps"] > 0
    assert "survival" not in last["new"]["fluid"] and "survival" in loop.events.latest[-1]["new"]["fluid"]


def test_points_of_one_cycle_have_one_time(cluster: Cluster) -> None:
    loop = loaded(cluster)
    columns = loop.outlook.history.columns()
    assert columns["a"]["at_unix_s"] == columns["b"]["at_unix_s"] == [pytest.approx(1.7e9 + cluster.clock_s)]
    assert columns["a"]["model"] == "m" and columns["a"]["seconds"] == [60.0]


def test_the_actor_answers_in_plain_values(cluster: Cluster) -> None:
    cluster.add("a")
    actor = ControllerActor("headrace", {DEPLOYMENT: tuned(CONFIG, TARGETS, FLUID)})
    actor._loop = new_loop(FakeStore(), targets=TARGETS, thresholds=FLUID)

    async def main() -> list[dict[str, Any]]:
        unknown = await actor.predict("m", {"replicas": 3, "targets": None})
        await actor._loop.one_cycle()
        values = {"replicas": 3, "targets": {"ttft_s": None, "tpot_s": 0.05, "latency_s": None}}
        return [unknown, await actor.predict("m", values), await actor.history(0.0), await actor.overview()]

    unknown, known, points, shown = asyncio.run(main())
    assert "no replica has reported" in unknown["reason"]
    assert (known["now"]["replicas"], known["then"]["replicas"]) == (1, 3)
    assert points["replicas"]["a"]["at_unix_s"] == [] and "started_unix_s" in points
    assert "prospects" in shown and "started_unix_s" in shown
