"""The controller's replicas learn together: a slow one is named, a new one begins with what its siblings know."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from fake_store import FakeStore
from pool_engines import LAW, KnownEngine
from synthetic_engine import LIMITS
from test_control_loop import CONFIG, DEPLOYMENT, Cluster, cluster, decision, tuned

from cluster.controller import ControlLoop
from router.dashboard.changed import change_in_words
from router.dashboard.oddities import oddities_of
from scheduler.engine.active_thresholds import ActiveThresholds
from scheduler.messages import Telemetry
from scheduler.thresholds import Thresholds
from scheduler.tuning.slo import Slo

__all__ = ["cluster"]
FLUID = Thresholds(policy="fluid")
TARGETS = Slo(ttft_s=3.0, tpot_s=0.08)


class Reporting:
    """An engine with known truths behind the interface of a synthetic one: every report is of another period."""

    def __init__(self, known: KnownEngine, **changed: Any) -> None:
        self.known, self.changed = known, changed
        self.active = ActiveThresholds(FLUID, known.period(0.05).limits, lambda: known.now_s)

    def report(self, cursor: int | None = 0) -> Telemetry:
        current = self.active.current()
        return self.known.period(thresholds=current.thresholds, from_config=current.from_config, **self.changed)


def started(cluster: Cluster, **slow: float) -> ControlLoop:
    """Six replicas r0 … r5; slow: how many times as long the iterations of some take."""
    for seed in range(6):
        add(cluster, seed, slow=slow.get(f"r{seed}", 1.0))
    return ControlLoop("headrace", {DEPLOYMENT: tuned(CONFIG, TARGETS, FLUID)}, FakeStore())


def add(cluster: Cluster, seed: int, *, slow: float = 1.0, **changed: Any) -> None:
    cluster.engines[f"r{seed}"] = Reporting(KnownEngine(seed, slow=slow), **changed)  # type: ignore[assignment]


def cycles(loop: ControlLoop, cluster: Cluster, count: int) -> None:
    for _ in range(count):
        asyncio.run(loop.one_cycle())
        cluster.clock_s += CONFIG.period_s


def shown(loop: ControlLoop, name: str) -> dict[str, Any]:
    found: dict[str, Any] = loop.state()["replicas"][name]
    return found


def params(cluster: Cluster, name: str) -> Any:
    return cluster.active(name).fluid


def test_a_slow_replica_is_named_in_the_state_in_an_event_and_on_the_dashboard(cluster: Cluster) -> None:
    loop = started(cluster, r4=1.9)
    cycles(loop, cluster, 4)
    state = loop.state()
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    found = shown(loop, "r4")["deviation"]
    assert found["text"] == "runs 1.9 times slower than its siblings" and found["low"] < 1.9 < found["high"]
    assert all(shown(loop, f"r{seed}")["deviation"] is None for seed in (0, 1, 2, 3, 5))
    (event,) = [one for one in loop.events if one.kind == "speed"]
    assert event.replica == "r4" and event.reason == found["text"]
    said = change_in_words(event.brief, event.at_unix_s)["sentence"]
    assert said == "Replica r4 runs 1.9 times slower than its siblings."
    rows = {
        name: one | {"reachable": True, "running": 1, "thresholds": {"pinned": False}}
        for name, one in state["replicas"].items()
    }
    oddities = oddities_of(rows, 10.0)
    assert [(one.name, one.text) for one in oddities["r4"]] == [
        ("slow", "It runs 1.9 times slower than its siblings.")
    ]
    assert oddities["r0"] == []


def test_a_slow_replica_has_its_own_thresholds_and_its_siblings_one_and_the_same(cluster: Cluster) -> None:
    loop = started(cluster, r4=1.9)
    cycles(loop, cluster, 4)
    assert params(cluster, "r4").capacity_rps < 0.7 * params(cluster, "r0").capacity_rps
    assert params(cluster, "r0").capacity_rps == pytest.approx(params(cluster, "r5").capacity_rps, rel=0.1)
    law = params(cluster, "r0").time_model
    assert law.iteration_s(0.0, 40.0, 30_000.0) == pytest.approx(LAW.iteration_s(0, 40, 30_000), rel=0.1)


def test_a_replica_that_recovers_is_no_longer_named(cluster: Cluster) -> None:
    loop = started(cluster, r4=1.9)
    cycles(loop, cluster, 4)
    cluster.engines["r4"].known.slow = 1.0  # type: ignore[attr-defined]
    cycles(loop, cluster, 20)
    assert shown(loop, "r4")["deviation"] is None
    assert [one.reason for one in loop.events if one.kind == "speed"] == [
        "runs 1.9 times slower than its siblings", "runs as fast as its siblings again",
    ]


def test_a_new_replica_is_tuned_in_its_first_cycle_by_what_its_siblings_know(cluster: Cluster) -> None:
    loop = started(cluster)
    cycles(loop, cluster, 4)
    add(cluster, 20, iterations=(), arrivals=(), finished=(), running=())  # it has served nothing
    cycles(loop, cluster, 1)
    new, old = params(cluster, "r20"), params(cluster, "r0")
    assert not new.cold
    assert new.capacity_rps == pytest.approx(old.capacity_rps, rel=0.1)
    assert shown(loop, "r20")["forecast"]["survival_samples"] > 100


def test_a_report_that_cannot_be_spoils_no_sibling_s_plan(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = started(cluster)
    cycles(loop, cluster, 8)
    before = params(cluster, "r0")
    bad = cluster.engines["r2"].report()
    broken = tuple(one._replace(seconds=1e6, prefill_tokens=10**8, kv_tokens=10**8) for one in bad.iterations)
    monkeypatch.setitem(cluster.engines["r2"].__dict__, "changed", {"iterations": broken})
    cycles(loop, cluster, 3)
    after = params(cluster, "r0")
    assert after.capacity_rps == pytest.approx(before.capacity_rps, rel=0.1)
    assert after.time_model.iteration_s(0.0, 40.0, 30_000.0) == pytest.approx(LAW.iteration_s(0, 40, 30_000), rel=0.1)
    assert not decision(loop, "r0").startswith("not tuned")


def test_replicas_with_other_engine_settings_are_not_of_one_kind(cluster: Cluster) -> None:
    """A smaller batch limit: other iterations, so nothing is compared."""
    loop = started(cluster)
    add(cluster, 7, slow=1.9, limits=replace(LIMITS, max_num_batched_tokens=512))
    cycles(loop, cluster, 4)
    assert shown(loop, "r7")["deviation"] is None
