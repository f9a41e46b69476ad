"""Events survive a restart of the controller; the latest are kept; each is one log line."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
from fake_store import FakeStore

from cluster.event_log import KEPT_EVENTS, Event, EventLog, changes, together
from scheduler.thresholds import Thresholds, TypeThreshold, thresholds_as_dict


def pushed(number: int) -> Event:
    return Event(at_unix_s=float(number), replica="a", model="m", old_version=number, new_version=number + 1)


def test_a_new_controller_shows_the_events_of_the_earlier_one() -> None:
    store = FakeStore()
    log = EventLog(store)
    log.read()
    log.add(pushed(1))
    log.add(Event(at_unix_s=2.0, kind="settings", by="anna", key="anonymous", old={"tpot_s": 1.0}, new={"tpot_s": 2.0}))
    successor = EventLog(store)
    successor.read()
    successor.read()
    assert successor.latest == log.latest and len(log.latest) == 2
    successor.add(pushed(3))
    third = EventLog(store)
    third.read()
    assert [event["at_unix_s"] for event in third.latest] == [1.0, 2.0, 3.0]


def test_the_latest_are_kept_here_and_in_the_store() -> None:
    store = FakeStore()
    log = EventLog(store)
    for number in range(KEPT_EVENTS + 5):
        log.add(pushed(number))
    assert len(store.values) == len(log.latest) == KEPT_EVENTS
    successor = EventLog(store)
    successor.read()
    assert successor.latest[0]["at_unix_s"] == 5.0


def test_an_event_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        EventLog(FakeStore()).add(
            Event(at_unix_s=1.0, kind="pin", model="m", by="anna", key="operator key", reason="rush hour")
        )
        EventLog(FakeStore()).add(pushed(1))
    assert [record.getMessage() for record in caplog.records] == [
        "pin of m by anna (operator key): rush hour", "thresholds of a: version 1 -> 2: ",
    ]


def test_a_change_of_thresholds_says_old_new_and_reason_in_one_line() -> None:
    old = Thresholds(policy="wait", max_running=32, types=(TypeThreshold(name="short", n=8),))
    new = replace(old, max_running=28, types=(TypeThreshold(name="short", n=6),), max_hold_s=0.123456)
    event = Event(
        at_unix_s=1.0, replica="a", old_version=1, new_version=2, reason="memory is the limit",
        old=thresholds_as_dict(old), new=thresholds_as_dict(new),
    )
    assert "\n" not in event.line
    assert event.line.startswith("thresholds of a: version 1 -> 2: memory is the limit (")
    said = set(event.line.partition("(")[2].rstrip(")").split("; "))
    assert {"max_running 32 -> 28", "types.short 8 -> 6"} < said
    assert len(said) == 3 and any(one.endswith("-> 0.1235") for one in said)


def test_a_line_is_bounded_and_leaves_curves_out() -> None:
    new = {"fluid": {"survival": {"lengths": [1, 2]}, "time_model": {"d0_s": 1.0}, "queue_limit": 3}}
    assert changes({"fluid": {"survival": {"lengths": [9]}, "queue_limit": None}}, new) == [
        "fluid.queue_limit none -> 3"
    ]
    many = changes({}, {f"k{number}": number for number in range(50)})
    assert len(many) == 13 and many[-1] == "38 more"


def test_a_store_that_fails_or_holds_something_else_loses_no_present_event() -> None:
    store = FakeStore()
    store.put("events/000000000001", {"kind": 3})
    log = EventLog(store)
    log.read()
    store.fails = True
    log.add(pushed(7))
    assert [event["at_unix_s"] for event in log.latest] == [7.0]


def test_where_many_replicas_change_alike_one_event_is_about_all_of_them() -> None:
    old, new = Thresholds(policy="fluid"), Thresholds(policy="fluid", version=1, max_running=7)

    def change(number: int, **changes: Any) -> tuple[Event, Thresholds, Thresholds]:
        given: dict[str, Any] = {"at_unix_s": 1.0, "replica": f"r{number}", "model": "m", "reason": "because"}
        return Event(**(given | changes)), old, new

    (one,) = together([change(number) for number in range(30)])
    assert (one.replica, one.model, one.reason) == ("", "m", "30 replicas alike: because")
    assert one.new["max_running"] == 7 and one.old["max_running"] is None
    few = together([change(number) for number in range(3)])
    assert [event.replica for event in few] == ["r0", "r1", "r2"] and few[0].new["max_running"] == 7
    apart = together([change(number, reason=f"of {number}") for number in range(30)])
    assert len(apart) == 30, "other reasons are other changes"
    refused = together([change(number, accepted=False, model="n" if number % 2 else "m") for number in range(40)])
    assert sorted(event.model for event in refused) == ["m", "n"]
