"""Dead and frozen engines: when a replica gives up, and what it does then. All on a clock of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from replicas.engine_health import COLD_ITERATIONS, COLD_TIMES, ENGINE_TIMEOUT_S, EngineHealth, ReplicaFailed, Stillness
from scheduler.engine.channel import ChannelClosed
from scheduler.messages import Stats
from scheduler.wire import UnreadableMessage

SILENT, GARBAGE = ChannelClosed("no answer"), UnreadableMessage("not JSON")


def stats(steps: int, engine_id: str = "e") -> Stats:
    return Stats(
        engine_id=engine_id, slots=4, running=1, waiting=0, kv_used_tokens=0, kv_capacity_tokens=10,
        thresholds_version=0, steps=steps,
    )


class World:
    """One replica. Each look at it takes half a second of its clock; `script` says what is seen."""

    def __init__(self, ranks: int = 1) -> None:
        self.now_s = 0.0
        self.dead = False
        self.unfinished, self.sent = [1] * ranks, 1000
        self.loop_runs = True
        self.answers: list[Any] = [stats(1000)] * ranks
        self.log: list[tuple[str, float]] = []
        self.each_period: Callable[[], None] = lambda: None
        self.health = EngineHealth(
            self.ask, ranks, lambda: self.log.append(("ended", self.now_s)), clock=lambda: self.now_s,
            sleep=self.sleep,
        )

    def is_dead(self) -> bool:
        return self.dead

    def requests(self, rank: int) -> int:
        return self.unfinished[rank]

    def outputs(self) -> int:
        return self.sent

    async def loop_answers(self) -> None:
        while not self.loop_runs:
            await asyncio.sleep(0)

    def kill(self) -> None:
        self.log.append(("killed", self.now_s))
        self.dead = True

    async def ask(self, rank: int) -> Stats:
        answer = self.answers[rank]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        if seconds == 0.5:
            self.each_period()
        await asyncio.sleep(0)

    def run(self, until_s: float) -> None:
        async def main() -> None:
            self.health.watch(self)
            while self.now_s < until_s and not any(what == "ended" for what, _ in self.log):
                await asyncio.sleep(0)
            self.health.stop()

        asyncio.run(main())

    def seconds(self, what: str) -> float:
        return dict(self.log)[what]


def test_a_dead_engine_is_known_without_a_request_and_the_process_ends() -> None:
    world = World()
    world.unfinished = [0]

    def dies() -> None:
        world.dead = world.now_s >= 3.0

    world.each_period = dies
    world.run(until_s=20)
    assert 3.0 <= world.seconds("killed") <= 3.5
    assert world.seconds("ended") - world.seconds("killed") <= 1.3
    with pytest.raises(ReplicaFailed, match="has died"):
        world.health.check()


def test_a_dead_engine_is_known_at_the_first_failure_of_a_request() -> None:
    async def main() -> None:
        world = World()
        world.health.watch(world)
        assert not world.health.failed
        world.dead = True
        assert world.health.failed and world.log == [("killed", world.now_s)]
        world.health.stop()

    asyncio.run(main())


@pytest.mark.parametrize("answer", [stats(7), SILENT], ids=["the channel answers", "the channel is silent"])
def test_an_engine_with_requests_and_without_progress_is_frozen(answer: Any) -> None:
    world = World()
    world.answers = [answer]
    world.run(until_s=60)
    assert ENGINE_TIMEOUT_S <= world.seconds("killed") <= ENGINE_TIMEOUT_S + 1.5
    with pytest.raises(ReplicaFailed, match=r"engine_timeout_s = 10"):
        world.health.check()


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_engine_that_compiles_in_its_first_iterations_is_not_frozen(ranks: int) -> None:
    """A first request took more than ten seconds on a new machine, and each engine was replaced at it."""
    world = World(ranks)
    world.sent = 0

    def compiles() -> None:
        world.answers = [stats(int(world.now_s / 60))] * ranks

    world.each_period = compiles
    world.run(until_s=200)
    assert world.log == []


@pytest.mark.parametrize("answer", [stats(0), SILENT], ids=["the channel answers", "the channel is silent"])
def test_a_new_engine_that_never_makes_progress_is_frozen_too(answer: Any) -> None:
    world = World()
    world.sent, world.answers = 0, [answer]
    world.run(until_s=300)
    assert COLD_TIMES * ENGINE_TIMEOUT_S <= world.seconds("killed") <= COLD_TIMES * ENGINE_TIMEOUT_S + 1.5


@pytest.mark.parametrize(("page", "said"), [
    ("docs/structures.md", f"In its first {COLD_ITERATIONS} iterations, which may compile kernels, an engine has "
                           f"{COLD_TIMES:g} times as long"),
    ("docs/configuration.md", f"kernels, has {COLD_TIMES:g} times as long"),
    ("docs/reference/configuration.md", f"{COLD_TIMES:g} times as many in its first iterations"),
    ("helm/headrace/README.md", f"{COLD_TIMES:g} times as many in an engine's first iterations"),
])
def test_the_documentation_says_how_long_a_new_engine_has(page: str, said: str) -> None:
    assert said in (Path(__file__).parents[2] / page).read_text(encoding="utf-8")


def test_the_timeout_may_be_set_while_it_runs() -> None:
    world = World()

    def shorter() -> None:
        if world.now_s >= 4.0:
            world.health.engine_timeout_s = 5.0

    world.each_period = shorter
    world.run(until_s=60)
    assert 5.0 <= world.seconds("killed") <= 6.5


def test_steps_without_a_token_are_progress() -> None:
    world = World()

    def steps() -> None:
        world.answers = [stats(1000 + int(world.now_s / 9))]  # each takes 9 s

    world.each_period = steps
    world.run(until_s=100)
    assert world.log == []


def test_outputs_are_progress_of_an_engine_whose_channel_is_broken() -> None:
    for answer in (SILENT, GARBAGE):
        world = World()
        world.answers = [answer]

        def sends(world: World = world) -> None:
            world.sent += 1

        world.each_period = sends
        world.run(until_s=100)
        assert world.log == []


@pytest.mark.parametrize("answer", [SILENT, GARBAGE])
def test_an_idle_engine_with_a_broken_channel_whose_loop_answers_stays(answer: Any) -> None:
    world = World()
    world.unfinished, world.answers = [0], [answer]
    world.run(until_s=100)
    assert world.log == []


def test_an_idle_engine_that_answers_its_channel_is_not_asked_more() -> None:
    world = World()
    world.unfinished, world.answers, world.loop_runs = [0], [stats(3)], False
    world.run(until_s=100)
    assert world.log == []


def test_an_idle_engine_that_answers_nothing_is_frozen() -> None:
    world = World()
    world.unfinished = [0]

    def freezes() -> None:
        if world.now_s >= 20:
            world.answers, world.loop_runs = [SILENT], False

    world.each_period = freezes
    world.run(until_s=100)
    assert 30 <= world.seconds("killed") <= 31.5
    assert "neither its channel nor vLLM" in str(world.health.failure)


def test_an_idle_engine_that_was_stopped_for_a_while_stays() -> None:
    world = World()
    world.unfinished = [0]

    def stopped() -> None:
        world.loop_runs = not 20 <= world.now_s < 28
        world.answers = [stats(0) if world.loop_runs else SILENT]

    world.each_period = stopped
    world.run(until_s=100)
    assert world.log == []


def test_the_time_begins_with_the_request() -> None:
    world = World()
    world.unfinished = [0]

    def arrives() -> None:
        world.unfinished = [int(world.now_s >= 50)]

    world.each_period = arrives
    world.run(until_s=100)
    assert 59.5 <= world.seconds("killed") <= 61.5


def test_an_error_of_the_watch_s_own_question_does_not_end_the_watch() -> None:
    world = World()
    world.answers = [RuntimeError("unexpected")]
    world.run(until_s=60)
    assert world.seconds("killed") >= ENGINE_TIMEOUT_S


def test_one_frozen_rank_among_others_that_send() -> None:
    world = World(ranks=2)

    def other_sends() -> None:
        world.sent += 1
        world.answers = [stats(world.sent), SILENT if world.now_s > 5 else stats(world.sent)]

    world.each_period = other_sends
    world.run(until_s=60)
    assert "rank 1" in str(world.health.failure)


def test_a_rank_without_requests_does_not_step_and_is_not_frozen() -> None:
    """A replica of two ranks ended itself, and with it a long answer on one, because the other had nothing to do."""
    world = World(ranks=2)
    world.unfinished = [1, 0]

    def one_works() -> None:
        world.sent += 1
        world.answers = [stats(world.sent), stats(500)]

    world.each_period = one_works
    world.run(until_s=300)
    assert world.log == []


def test_a_pause_of_this_process_is_no_silence_of_the_engine() -> None:
    stillness = Stillness(1)
    assert stillness.see(0, stats(1), 1, 0, 0.5) == 0.0
    assert stillness.see(0, stats(1), 1, 0, 3600.0) == 2.0
    assert stillness.see(0, stats(2), 1, 0, 0.5) == 0.0


def test_a_restarted_engine_is_not_a_still_one() -> None:
    stillness = Stillness(1)
    stillness.see(0, stats(1), 1, 0, 0.5)
    assert stillness.see(0, stats(1, "another"), 1, 0, 0.5) == 0.0


def test_the_process_ends_after_the_requests_under_way_have_their_error_but_not_later_than_a_second() -> None:
    async def ended_after(requests_take_s: float) -> float:
        world = World()
        world.health.watch(world)
        world.dead = True
        with world.health.request():
            assert world.health.failed
            while world.now_s < requests_take_s and not world.log[1:]:
                await asyncio.sleep(0)
        while not world.log[1:]:
            await asyncio.sleep(0)
        return world.seconds("ended")

    assert asyncio.run(ended_after(0.3)) <= 0.6
    assert 1.0 <= asyncio.run(ended_after(60.0)) <= 1.3
