"""How many replicas the controller wants: from engines' reports to the store, the state and the metric."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fake_store import FakeStore

from cluster import scaling as scaling_module
from cluster.scaling import Scaling, start_ups_key
from cluster.settings import ModelSettings
from cluster.tuned import TunedModel
from replicas.ranks import EngineAddress, ServedModel
from replicas.store import wanted_key
from scheduler.messages import Counters
from scheduler.tuning.wanted_replicas import Capacity

DEPLOYMENT = "HeadraceServer:m"
SETTINGS = {"thresholds": {"policy": "fluid"}, "autoscaling": {"start_up_s": 30.0}}


class Cluster:
    """Engines of which each gets the same rate; looks every five seconds."""

    def __init__(self, settings: dict[str, Any] | None = None, ranks: int = 1) -> None:
        self.store, self.now_s = FakeStore(), 100.0
        self.models = {DEPLOYMENT: TunedModel(
            ServedModel("m", ranks), ModelSettings.model_validate(SETTINGS | (settings or {}))
        )}
        self.scaling = Scaling(self.store)
        self.engines: dict[str, Any] = {}

    def engine(self, name: str, *, draining: bool = False) -> None:
        telemetry = SimpleNamespace(engine_id="1", counters=Counters(), draining=draining)
        self.engines[name] = SimpleNamespace(
            engine=EngineAddress("actor", 0, "m", DEPLOYMENT),
            tuner=SimpleNamespace(model=SimpleNamespace(telemetry=telemetry)),
        )

    def look(self, each_rps: float = 0.0, silent: str = "") -> dict[str, Any]:
        self.now_s += 5
        for one in self.engines.values():
            report = one.tuner.model.telemetry
            report.counters = Counters(arrivals=report.counters.arrivals + int(5 * each_rps))
        answered = [name for name in self.engines if name != silent]
        self.scaling.look(self.now_s, self.now_s, self.models, self.engines, answered)
        return dict(self.store.get(wanted_key(DEPLOYMENT)) or {})


@pytest.fixture
def each_takes(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    takes = [2.0]
    monkeypatch.setattr(scaling_module, "capacity_of", lambda models, ranks: Capacity(ranks * takes[0], "memory"))
    return takes


def test_the_number_is_left_where_serves_policy_reads_it(each_takes: list[float]) -> None:
    cluster = Cluster()
    cluster.engine("a")
    for _ in range(30):
        told = cluster.look(each_rps=6.0)
    assert told["replicas"] == 4, "6 a second, and what a start-up time's fluctuation adds, at 2 each"
    assert told["look"] == cluster.now_s and told["valid_for_s"] == 30.0
    assert "rejected ones included" in told["reason"]
    assert cluster.scaling.shown()["m"]["replicas"] == 4 == cluster.scaling.wanted["m"].replicas


def test_engines_of_one_replica_count_together(each_takes: list[float]) -> None:
    cluster = Cluster(ranks=2)
    for name in ("a#0", "a#1"):
        cluster.engine(name)
    for _ in range(30):
        told = cluster.look(each_rps=3.0)
    assert told["replicas"] == 2 and told["each_rps"] == 4.0


def test_what_a_start_took_outlives_the_controller(each_takes: list[float]) -> None:
    cluster = Cluster()
    cluster.engine("a")
    cluster.look(each_rps=1.0)
    cluster.engine("b")
    for _ in range(3):
        cluster.look(each_rps=1.0, silent="b")
    told = cluster.look(each_rps=1.0)
    assert told["start_up_s"] == 15.0 and told["measured"] and cluster.store.get(start_ups_key(DEPLOYMENT)) == [15.0]
    cluster.scaling = Scaling(cluster.store)
    assert cluster.look()["start_up_s"] == 15.0


def test_a_replica_that_leaves_is_none_that_there_is(each_takes: list[float]) -> None:
    cluster = Cluster()
    cluster.engine("a")
    cluster.engine("b", draining=True)
    assert cluster.look()["replicas"] == 1


def test_other_policies_plan_no_number_and_a_failing_decision_leaves_the_last_word(
    each_takes: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster({"thresholds": {"policy": "wait"}})
    cluster.engine("a")
    assert cluster.look() == {} and cluster.scaling.shown() == {}
    failing = Cluster()
    failing.engine("a")
    before = failing.look()
    monkeypatch.setattr(scaling_module, "capacity_of", lambda *_: 1 / 0)
    failing.now_s += 60
    assert failing.look() == before
