"""Pins of models and of single engines, kept in a store that outlives the controller."""

from __future__ import annotations

import pytest
from fake_store import FakeStore

from cluster.pins import Pin, Pins
from scheduler.thresholds import Thresholds, thresholds_as_dict

PINNED = Thresholds(version=4, policy="fcfs", max_running=3, pinned=True)
TUNED = Thresholds(version=9, policy="fcfs", max_running=8)
PIN = Pin(thresholds=thresholds_as_dict(PINNED), by="anna", key="operator key", at_unix_s=100.0, reason="rush hour")


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def pins(store: FakeStore) -> Pins:
    pins = Pins(store)
    pins.read()
    return pins


def test_a_new_replica_lacks_its_model_s_pin_until_it_is_given(pins: Pins) -> None:
    pins.pin(PIN, models=["small"])
    assert pins.missing("a", "small", TUNED) == PIN
    assert pins.missing("a", "large", TUNED) is None
    values = PIN.values(now_s=100.0)
    assert (values.max_running, values.pinned, values.version, values.valid_for_s) == (3, True, 0, None)
    pins.given("a", "small")
    assert pins.missing("a", "small", PINNED) is None
    assert pins.missing("a", "small", TUNED) is not None, "whatever lifted it"
    assert pins.missing("b", "small", PINNED) is not None, "pinned, but not to these values"


def test_a_new_controller_knows_the_pins(pins: Pins, store: FakeStore) -> None:
    pins.pin(PIN, models=["small"])
    pins.pin(PIN, engines=["a"])
    pins.release(engines=["b"])
    pins.given("c", "small")
    successor = Pins(store)
    successor.read()
    assert successor.state() == {
        "small": {"by": "anna", "key": "operator key", "at_unix_s": 100.0, "reason": "rush hour", "until_unix_s": None}
    }
    assert successor.of("a", "large") == PIN and successor.of("b", "small") is None
    assert successor.missing("c", "small", PINNED) is None


def test_a_release_of_the_model_ends_its_pin(pins: Pins, store: FakeStore) -> None:
    pins.pin(PIN, models=["small", "large"])
    pins.release(models=["small"])
    assert pins.missing("a", "small", TUNED) is None and pins.missing("a", "large", TUNED) == PIN
    successor = Pins(store)
    successor.read()
    assert successor.state().keys() == {"large"}


def test_what_is_said_of_one_engine_goes_before_its_model_s_pin_and_with_the_engine(pins: Pins) -> None:
    pins.pin(PIN, models=["small"])
    pins.release(engines=["a"])
    assert pins.missing("a", "small", TUNED) is None and pins.of("a", "small") is None
    pins.keep_only(["b"], now_s=200.0)
    assert pins.missing("a", "small", TUNED) == PIN, "the entry went with the engine"
    pins.release(engines=["b"])
    pins.pin(PIN, models=["small"], instead_of=["b"])
    assert pins.missing("b", "small", TUNED) == PIN, "a pin for all counts for it too"


def test_a_pin_with_an_end_is_given_for_the_rest_of_its_time_and_then_dropped(pins: Pins) -> None:
    pins.pin(Pin(thresholds=thresholds_as_dict(PINNED), until_unix_s=160.0), models=["small"])
    pin = pins.missing("a", "small", TUNED)
    assert pin is not None and pin.values(now_s=100.0).valid_for_s == 60.0
    pins.keep_only(["a"], now_s=160.0)
    assert pins.missing("a", "small", TUNED) is None and pins.state() == {}


@pytest.mark.parametrize("stored", [[], {"models": {"small": 3}, "engines": {}}, {"models": {}}])
def test_pins_of_another_release_are_dropped_and_said(
    store: FakeStore, stored: object, caplog: pytest.LogCaptureFixture
) -> None:
    store.put("pins", stored)
    pins = Pins(store)
    pins.read()
    assert pins.state() == {} and "another release" in caplog.text
