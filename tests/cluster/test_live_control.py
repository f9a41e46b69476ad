"""Settings, pins and events of a controller that runs."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from fake_store import FakeStore
from test_control_loop import (  # the fixture too
    CONFIG,
    CONFIGURED,
    DEPLOYMENT,
    Cluster,
    cluster,
    decision,
    new_loop,
    one_cycle,
    tuned,
)

from cluster.controller import ControlLoop
from cluster.inbox import NOT_TUNED
from cluster.pins import Pin
from scheduler.settings import LiveSettings
from scheduler.thresholds import Thresholds, thresholds_as_dict
from scheduler.tuning.slo import Slo

__all__ = ["cluster"]
FLUID = Thresholds(policy="fluid")


def pin_of(thresholds: Thresholds, **fields: object) -> Pin:
    values = {"by": "anna", "key": "operator key", "at_unix_s": 5.0, "reason": "rush hour"} | fields
    return Pin(thresholds=thresholds_as_dict(replace(thresholds, pinned=True)), **values)  # type: ignore[arg-type]


def pin(loop: ControlLoop, value: Pin, models: list[str] | None = None, engines: list[str] | None = None) -> None:
    asyncio.run(loop.pin(value, models or [], engines or []))


def test_an_engine_is_tuned_for_the_targets_that_it_reports(cluster: Cluster) -> None:
    engine = cluster.add("a")
    engine.settings = LiveSettings(thresholds=FLUID, targets=Slo(tpot_s=0.1), overflow_probability=0.05)
    loop = new_loop(targets=Slo(tpot_s=9.0), thresholds=FLUID)
    cluster.traffic()
    one_cycle(loop)
    assert cluster.active("a").fluid.tpot_s == 0.1  # type: ignore[union-attr]
    assert loop.state()["replicas"]["a"]["targets"]["tpot_s"] == 0.1
    seen = loop.state()["replicas"]["a"]["finished_seen"]

    engine.settings = LiveSettings(thresholds=FLUID, targets=Slo(tpot_s=0.06), overflow_probability=0.02)
    one_cycle(loop)
    params = cluster.active("a").fluid
    assert params is not None and (params.tpot_s, params.miss_probability, params.cold) == (0.06, 0.02, False)
    assert loop.state()["replicas"]["a"]["finished_seen"] == seen, "the estimates stay"


def test_new_controller_settings_are_in_force_with_the_next_cycle_and_estimates_stay(cluster: Cluster) -> None:
    cluster.add("a")
    loop = new_loop(config=CONFIG.model_copy(update={"min_finished": 10_000, "period_s": 60.0}))
    cluster.traffic()
    one_cycle(loop)
    assert cluster.offered == [] and loop.period_s == 60.0
    loop.configure({DEPLOYMENT: tuned(CONFIG.model_copy(update={"validity_s": 33.0}))})
    one_cycle(loop)
    assert loop.period_s == CONFIG.period_s
    assert cluster.active("a").valid_for_s == 33.0, "the 240 requests seen count for the new least number"


def test_a_new_replica_gets_its_model_s_pin_within_one_period(cluster: Cluster) -> None:
    cluster.add("a")
    loop = new_loop()
    one_cycle(loop)
    cluster.operator("a", pinned=True, max_running=3)
    pin(loop, pin_of(cluster.active("a"), given_to=("a",)), models=["m"])
    cluster.add("b")
    one_cycle(loop)
    assert cluster.active("b").pinned and cluster.active("b").max_running == 3
    assert [name for name, _, _ in cluster.offered] == ["b"]
    state = loop.state()
    assert state["pins"]["m"]["by"] == state["replicas"]["b"]["pin"]["by"] == "anna"
    assert state["replicas"]["b"]["pin"]["reason"] == "rush hour"
    assert [(event.kind, event.replica) for event in loop.events] == [("pin", ""), ("pin", "b")]
    one_cycle(loop)
    assert len(cluster.offered) == 1, "once"


def test_a_new_controller_gives_the_pin_too_and_shows_the_events(cluster: Cluster) -> None:
    store = FakeStore()
    first = new_loop(store)
    pin(first, pin_of(replace(CONFIGURED, max_running=3)), models=["m"])
    cluster.add("a")
    second = new_loop(store)
    one_cycle(second)
    assert cluster.active("a").max_running == 3
    assert [event.kind for event in second.events] == ["pin", "pin"]


def test_a_pin_of_one_replica_is_for_it_alone_and_goes_with_it(cluster: Cluster) -> None:
    cluster.add("a")
    loop = new_loop()
    one_cycle(loop)
    cluster.operator("a", pinned=True, max_running=3)
    pin(loop, pin_of(cluster.active("a")), engines=["a"])
    del cluster.engines["a"]
    cluster.add("b")
    one_cycle(loop)
    assert not cluster.active("b").pinned and loop.state()["replicas"]["b"]["pin"] is None
    cluster.add("a")  # another engine of that name
    one_cycle(loop)
    assert not cluster.active("a").pinned


def test_a_release_ends_the_pin_for_new_replicas_and_is_an_event(cluster: Cluster) -> None:
    cluster.add("a")
    loop = new_loop()
    pin(loop, pin_of(replace(CONFIGURED, max_running=3)), models=["m"])
    one_cycle(loop)
    cluster.operator("a", pinned=False)
    asyncio.run(loop.release(Pin(thresholds={}, by="ben", key="anonymous", at_unix_s=6.0), ["m"], []))
    cluster.add("b")
    one_cycle(loop)
    assert not cluster.active("a").pinned and not cluster.active("b").pinned
    assert ("release", "ben") in [(event.kind, event.by) for event in loop.events]
    assert loop.state()["pins"] == {}


def test_a_pin_that_an_engine_cannot_have_is_said_and_stops_nothing(cluster: Cluster) -> None:
    cluster.add("a")
    loop = new_loop()
    pin(loop, pin_of(replace(CONFIGURED, max_running=10_000)), models=["m"])
    one_cycle(loop)
    assert "the pin of m was rejected: " in decision(loop, "a") and "max_running = 10000" in decision(loop, "a")


def test_a_store_that_fails_at_first_loses_no_pin_of_it(cluster: Cluster) -> None:
    store = FakeStore()
    pin(new_loop(store), pin_of(replace(CONFIGURED, max_running=3)), models=["m"])
    cluster.add("a")
    loop = new_loop(store)
    store.fails = True
    with pytest.raises(ConnectionError):  # the actor's loop logs it and goes on
        one_cycle(loop)
    store.fails = False
    one_cycle(loop)
    assert cluster.active("a").max_running == 3


OFF, OFF_DEPLOYMENT = CONFIG.model_copy(update={"enabled": False}), "HeadraceServer:off"


def loop_with_an_untuned_model(cluster: Cluster, store: FakeStore) -> ControlLoop:
    """The model "m" is tuned; "off", with the engines x and y, is not."""
    cluster.deployments = {"x": OFF_DEPLOYMENT, "y": OFF_DEPLOYMENT}
    return ControlLoop("headrace", {DEPLOYMENT: tuned(), OFF_DEPLOYMENT: tuned(OFF, model_id="off")}, store)


def test_a_pin_of_a_model_whose_tuning_is_off_is_for_its_new_replicas_too(cluster: Cluster) -> None:
    cluster.add("a")
    cluster.add("x")
    store = FakeStore()
    loop = loop_with_an_untuned_model(cluster, store)
    one_cycle(loop)
    cluster.operator("x", pinned=True, max_running=3)
    pin(loop, pin_of(cluster.active("x"), given_to=("x",)), models=["off"])
    cluster.add("y")
    one_cycle(loop)
    assert cluster.active("y").pinned and cluster.active("y").max_running == 3
    assert not cluster.active("a").pinned, "of another model"
    assert [(event.kind, event.replica, event.by) for event in loop.events] == [
        ("pin", "", "anna"), ("pin", "y", "anna")
    ]
    assert loop.state()["replicas"].keys() == {"a"}, "they are not tuned for that"
    one_cycle(loop)
    one_cycle(loop_with_an_untuned_model(cluster, store))
    assert [name for name, _, _ in cluster.offered] == ["y"], "once, whatever controller runs"
    assert loop.report(OFF_DEPLOYMENT, {}) == NOT_TUNED


def test_what_is_said_of_one_engine_stays_while_tuning_is_off_and_goes_with_the_engine(cluster: Cluster) -> None:
    cluster.add("x")
    cluster.add("y")
    store = FakeStore()
    loop = loop_with_an_untuned_model(cluster, store)
    pinned = pin_of(replace(CONFIGURED, max_running=3))
    pin(loop, pinned, models=["off"])
    one_cycle(loop)
    cluster.operator("x", pinned=False)
    asyncio.run(loop.release(Pin(thresholds={}, by="ben"), [], ["x"]))
    cluster.operator("y", pinned=True, max_running=5)
    pin(loop, pin_of(cluster.active("y")), engines=["y"])
    one_cycle(loop)
    loop.configure({DEPLOYMENT: tuned(), OFF_DEPLOYMENT: tuned(model_id="off")})
    one_cycle(loop)
    assert not cluster.active("x").pinned, "turned on again, the release still holds"
    assert cluster.active("y").max_running == 5
    shown = loop.state()["replicas"]
    assert (shown["x"]["pin"], shown["y"]["pin"]["by"]) == (None, "anna")

    loop.configure({DEPLOYMENT: tuned(), OFF_DEPLOYMENT: tuned(OFF, model_id="off")})
    del cluster.engines["x"]
    one_cycle(loop)
    cluster.add("x")  # another engine of that name
    one_cycle(loop)
    assert cluster.active("x").pinned and cluster.active("x").max_running == 3


def test_a_new_pin_of_a_model_whose_tuning_is_off_counts_for_engines_released_before(cluster: Cluster) -> None:
    cluster.add("x")
    loop = loop_with_an_untuned_model(cluster, FakeStore())
    one_cycle(loop)
    asyncio.run(loop.release(Pin(thresholds={}), [], ["x"]))
    pin(loop, pin_of(replace(CONFIGURED, max_running=3)), models=["off"])
    one_cycle(loop)
    assert cluster.active("x").max_running == 3


def test_an_untuned_engine_that_cannot_have_the_pin_stops_nothing(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "axy":
        cluster.add(name)
    loop = loop_with_an_untuned_model(cluster, FakeStore())
    pin(loop, pin_of(replace(CONFIGURED, max_running=3)), models=["off"])

    def fails(name: str) -> None:
        if name == "x":
            raise RuntimeError("the engine is gone")

    cluster.before_apply = fails
    cluster.traffic()
    one_cycle(loop)
    assert sorted(name for name, _, _ in cluster.offered) == ["a", "y"]
    assert "replica x has not got the pin of its model" in caplog.text
