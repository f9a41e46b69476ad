"""The watch of the replicas: one that is silent delays neither the others nor readiness."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from replicas.ranks import EngineAddress
from router.front_door import FrontDoor
from router.replica_watch import FRESH_S, PERIOD_S, ReplicaWatch, Report, readiness
from scheduler.messages import Stats
from scheduler.wire import OtherSchema

STATS = Stats(
    engine_id="e", slots=4, running=1, waiting=0, kv_used_tokens=0, kv_capacity_tokens=10, thresholds_version=0
)


class World:
    """Replicas by name, each with its answer, on a clock that moves only when every task sleeps or waits."""

    def __init__(self, **answers: Any) -> None:
        self.now_s = 0.0
        self.answers = answers
        self.asked: list[str] = []
        self.listed: dict[str, EngineAddress] | Exception = {
            name: EngineAddress(name, model_id=f"model-{name}") for name in answers
        }
        self.watch = ReplicaWatch(
            self.engines, self.ask, clock=lambda: self.now_s, sleep=self.sleep
        )
        self._sleeping: list[asyncio.Event] = []

    def engines(self) -> dict[str, EngineAddress]:
        if isinstance(self.listed, Exception):
            raise self.listed
        return self.listed

    async def ask(self, address: EngineAddress) -> Stats:
        self.asked.append(address.actor_name)
        answer = self.answers[address.actor_name]
        if answer == "silent":
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def sleep(self, seconds: float) -> None:
        assert seconds == PERIOD_S
        woken = asyncio.Event()
        self._sleeping.append(woken)
        await woken.wait()

    async def tick(self) -> None:
        """One period later, when every task that can go on has done so."""
        self.now_s += PERIOD_S
        sleeping, self._sleeping = self._sleeping, []
        for woken in sleeping:
            woken.set()
        await self.settle()

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.to_thread(lambda: None)
            await asyncio.sleep(0)

    def run(self, scenario: Callable[[], Any]) -> None:
        async def main() -> None:
            watching = asyncio.create_task(self.watch.run())
            await self.settle()
            await scenario()
            watching.cancel()

        asyncio.run(main())


def test_the_latest_answer_of_each_is_kept_with_its_age() -> None:
    world = World(a=STATS)

    async def scenario() -> None:
        assert world.watch.latest() == {"a": Report("a", "model-a", STATS, None, 0.0)}
        world.answers["a"] = RuntimeError("gone")
        await world.tick()
        assert world.watch.latest() == {"a": Report("a", "model-a", STATS, "gone", PERIOD_S)}
        assert world.watch.latest()["a"].is_ready
        for _ in range(round(FRESH_S / PERIOD_S)):
            await world.tick()
        assert not world.watch.latest()["a"].is_ready

    world.run(scenario)


def test_a_silent_one_delays_no_other_and_is_asked_once() -> None:
    world = World(a="silent", b=STATS)

    async def scenario() -> None:
        for _ in range(8):
            await world.tick()
        assert world.asked.count("a") == 1 and world.asked.count("b") >= 8
        latest = world.watch.latest()
        assert (latest["a"].is_ready, latest["a"].age_s) == (False, None)
        assert (latest["b"].is_ready, latest["b"].age_s) == (True, 0.0)

    world.run(scenario)


def test_replicas_come_and_go_and_a_list_that_fails_keeps_the_known_ones() -> None:
    world = World(a=STATS, b=STATS)

    async def scenario() -> None:
        world.listed = {"b": EngineAddress("b")}
        await world.tick()
        assert world.watch.latest().keys() == {"b"}
        asked = world.asked.count("a")
        world.listed = RuntimeError("no answer from Ray")
        await world.tick()
        await world.tick()
        assert world.watch.latest()["b"].age_s == 0.0 and world.asked.count("a") == asked

    world.run(scenario)


def test_a_front_door_over_the_watch_knows_each_new_answer_and_each_replica_that_comes_or_goes() -> None:
    world = World(a=replace(STATS, room=3), b=replace(STATS, room=1))
    world.listed = {name: EngineAddress(name, model_id="m") for name in "ab"}
    door = FrontDoor(world.watch, lambda: world.now_s)

    async def scenario() -> None:
        assert door.room("m") == 4
        world.answers["b"] = replace(STATS, room=5)
        await world.tick()
        assert door.room("m") == 8
        world.answers |= {"a": "silent", "b": "silent", "c": "silent"}
        await world.tick()
        world.listed = {"a": EngineAddress("a", model_id="m")}
        await world.tick()
        assert door.room("m") == 3, "by its last answer"
        world.listed = {name: EngineAddress(name, model_id="m") for name in "ac"}
        await world.tick()
        assert door.room("m") is None, "the new one has not answered"

    world.run(scenario)


def test_a_replica_of_another_release_is_ready_though_it_cannot_be_read() -> None:
    world = World(a=OtherSchema("the replica", 2))

    async def scenario() -> None:
        assert world.watch.latest()["a"].is_ready and world.watch.latest()["a"].stats is None

    world.run(scenario)


def report(name: str, model: str, age_s: float | None) -> Report:
    return Report(name, model, None, None, age_s)


def test_a_replica_is_ready_with_one_of_its_ranks_and_models_without_one_are_named() -> None:
    reports = [report("a#0", "m", None), report("a#1", "m", 1.0), report("b#0", "n", FRESH_S + 1)]
    assert readiness(reports, ["m", "n", "o"]) == {
        "status": "ready", "ready": 1, "replicas": 2, "models_without_replica": ["n", "o"],
    }
    assert readiness([], ["m"]) == {
        "status": "not ready", "ready": 0, "replicas": 0, "models_without_replica": ["m"],
    }
