"""Events survive a restart of the controller; the latest are kept; each is one log line."""

from __future__ import annotations

import logging

import pytest
from fake_store import FakeStore

from cluster.event_log import KEPT_EVENTS, Event, EventLog


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


def test_a_store_that_fails_or_holds_something_else_loses_no_present_event() -> None:
    store = FakeStore()
    store.put("events/000000000001", {"kind": 3})
    log = EventLog(store)
    log.read()
    store.fails = True
    log.add(pushed(7))
    assert [event["at_unix_s"] for event in log.latest] == [7.0]
