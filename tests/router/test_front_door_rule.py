"""The rule of the front door as a pure object: who is let through, on what knowledge, and how many in all."""

from __future__ import annotations

import math
import random
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

from router.front_door import FULL, FrontDoor, Tenant
from scheduler.messages import Stats
from scheduler.rejection import Rejection

PERIOD_S = 0.5


class OneReport(NamedTuple):
    model: str
    stats: Stats | None
    answered_s: float | None


@dataclass
class Watch:
    """Reports as a test sets them."""

    clock: list[float] = field(default_factory=lambda: [100.0])
    reports: dict[str, OneReport] = field(default_factory=dict)
    revision: int = 0

    def now(self) -> float:
        return self.clock[0]

    def answers(self) -> Collection[OneReport]:
        return self.reports.values()

    def report(self, name: str, room: int | None, *, model: str = "m", waiting: int = 5, retry_s: float = 8.0) -> None:
        stats = Stats(
            engine_id=name, slots=8, running=8, waiting=waiting, kv_used_tokens=1, kv_capacity_tokens=2,
            thresholds_version=0, room=room, drain_rps=2.0, retry_after_s=retry_s,
        )
        self.revision += 1
        self.reports[name] = OneReport(model, stats, self.clock[0])

    def silent(self, name: str) -> None:
        self.revision += 1
        self.reports[name] = OneReport("m", None, None)


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def door(watch: Watch) -> FrontDoor:
    return door_at(watch)


def door_at(watch: Watch, ingresses: int = 1, seed: int = 1) -> FrontDoor:
    door = FrontDoor(watch, lambda: watch.clock[0], random.Random(seed).random)
    door.ingresses = ingresses
    return door


def send(door: FrontDoor, count: int = 1, requests: int = 1, tenant: Tenant | None = None) -> int:
    """How many of so many requests are let through."""
    through = 0
    for number in range(count):
        if door.full("m", f"r{number}", requests, tenant) is None:
            door.sent("m", requests, tenant)
            through += 1
    return through


def test_a_full_model_is_rejected_as_the_engine_would_with_a_jittered_time(door: FrontDoor, watch: Watch) -> None:
    watch.report("a", 0, retry_s=20.0)
    watch.report("b", 0, retry_s=8.0)
    assert door.full("m", "chatcmpl-7") == Rejection.for_drain_time(FULL, 8.0, "chatcmpl-7")
    times = {found.retry_after_s for n in range(200) if (found := door.full("m", f"r{n}"))}
    assert times == set(range(7, 11)), "8 s and a quarter either way, rounded up"


def test_one_replica_with_room_is_enough(door: FrontDoor, watch: Watch) -> None:
    watch.report("a", 0)
    watch.report("b", 3)
    assert send(door, 10) == 3


@pytest.mark.parametrize("other", ["silent", "old", "unlimited", "none"])
def test_a_replica_of_which_nothing_is_known_counts_as_having_room(door: FrontDoor, watch: Watch, other: str) -> None:
    watch.report("b", 0)
    if other == "old":
        watch.clock[0] += 3.5
    watch.report("a", None if other == "unlimited" else 0)
    if other == "silent":
        watch.silent("b")
    if other == "none":
        watch.reports.clear()
    assert send(door, 50) == 50


def test_models_do_not_share_room(door: FrontDoor, watch: Watch) -> None:
    watch.report("a", 0)
    watch.report("b", 9, model="other")
    assert door.full("m", "r") is not None
    assert door.full("other", "r") is None


def test_what_was_sent_since_the_report_takes_its_place_and_what_ended_gives_it_back(
    door: FrontDoor, watch: Watch
) -> None:
    watch.report("a", 2)
    watch.clock[0] += 0.1
    assert send(door, 5) == 2
    watch.clock[0] += 0.1
    door.ended("m")
    assert send(door, 5) == 1
    watch.clock[0] += 0.4
    watch.report("a", 4)
    watch.clock[0] += 0.1
    assert send(door, 9) == 4, "the new report has seen what was sent before it"


def test_several_choices_take_as_many_places(door: FrontDoor, watch: Watch) -> None:
    watch.report("a", 10)
    assert send(door, 5, requests=4) == 2
    assert send(door, 5) == 2
    watch.clock[0] += 0.2
    watch.report("a", 3, waiting=0)
    assert send(door, 1, requests=16) == 1, "an engine without a queue decides itself"
    watch.clock[0] += 0.2
    watch.report("a", 0, waiting=0)
    assert send(door, 1, requests=16) == 0


@pytest.mark.parametrize("ingresses", [1, 2, 3, 8])
@pytest.mark.parametrize("room", [1, 2, 7, 40])
def test_several_ingresses_together_send_little_more_than_the_room(watch: Watch, ingresses: int, room: int) -> None:
    doors = [door_at(watch, ingresses, seed) for seed in range(ingresses)]
    totals = [0] * ingresses
    for _ in range(40):
        watch.clock[0] += PERIOD_S
        watch.report("a", room)
        sent = [send(door, 100) for door in doors]
        assert sum(sent) <= room + ingresses - 1
        totals = [total + count for total, count in zip(totals, sent, strict=True)]
    assert sum(totals) == pytest.approx(40 * room, rel=0.3)
    assert min(totals) >= 1, "none is shut out"


@pytest.mark.parametrize("ingresses", [1, 3])
def test_at_three_times_capacity_the_replica_stays_busy_and_rejects_little(watch: Watch, ingresses: int) -> None:
    """A replica of 8 slots and a queue of 4, 2 s a request; Poisson arrivals at three times its 4 requests/s."""
    drawn = random.Random(3)
    doors = [door_at(watch, ingresses, seed) for seed in range(ingresses)]
    running: list[tuple[float, int]] = []
    waiting: list[int] = []
    served = rejected_there = rejected_here = 0
    next_arrival_s = watch.clock[0]
    end_s = watch.clock[0] + 200.0
    reported_s = -math.inf
    while watch.clock[0] < end_s:
        watch.clock[0] += 0.01
        now_s = watch.clock[0]
        for ended in [one for one in running if one[0] <= now_s]:
            running.remove(ended)
            doors[ended[1]].ended("m")
            served += 1
        while waiting and len(running) < 8:
            running.append((now_s + drawn.expovariate(0.5), waiting.pop(0)))
        if now_s - reported_s >= PERIOD_S:
            watch.report("a", 4 - len(waiting) + 8 - len(running), waiting=len(waiting))
            reported_s = now_s
        while next_arrival_s <= now_s:
            next_arrival_s += drawn.expovariate(12.0)
            which = drawn.randrange(ingresses)
            if doors[which].full("m", str(next_arrival_s)):
                rejected_here += 1
                continue
            doors[which].sent("m")
            if len(waiting) < 4:
                waiting.append(which)
            else:
                rejected_there += 1
    assert served >= 0.95 * 4 * 200
    assert rejected_there <= (0.02 if ingresses == 1 else 0.1) * rejected_here


def test_a_tenant_below_its_share_is_let_through_to_the_engine(door: FrontDoor, watch: Watch) -> None:
    heavy, light = Tenant("heavy", 1.0), Tenant("light", 1.0)
    watch.report("a", 6)
    assert send(door, 20, tenant=heavy) == 6, "alone it may have it all"
    assert 1 <= send(door, 20, tenant=light) <= 7
    assert send(door, 20, tenant=heavy) == 0
    watch.clock[0] += 6.0
    watch.report("a", 0)
    assert send(door, 5, tenant=light) == 0, "the other asks for nothing now: no share to be kept"


def test_shares_go_by_weight(door: FrontDoor, watch: Watch) -> None:
    red, blue = Tenant("red", 3.0), Tenant("blue", 1.0)
    through = {"red": 0, "blue": 0}
    for moment in range(400):
        watch.clock[0] += 0.1
        if moment % 5 == 0:
            watch.report("a", 1)
        for tenant in (blue, red):  # blue always comes first
            through[tenant.name] += send(door, 2, tenant=tenant)
    assert through["blue"] >= 60
    assert 2.0 < through["red"] / through["blue"] < 4.0


def test_what_was_turned_away_is_told_once(door: FrontDoor, watch: Watch) -> None:
    watch.report("a", 0)
    send(door, 3)
    send(door, 1, requests=4)
    assert (door.rejected, door.take_turned_away("m"), door.take_turned_away("m")) == (7, 7, 0)
