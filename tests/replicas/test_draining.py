"""The drain of a replica: its engines are told, a silent one delays nothing, and the bound ends the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from replicas import draining
from replicas.draining import Draining
from scheduler.engine.channel import ChannelClosed
from scheduler.messages import Ack, Drain
from scheduler.rejection import Kind
from scheduler.wire import answer_of, read_question

WAITING, ALL = Drain(end=False), Drain(end=True)
YES = answer_of(Ack(accepted=True, active_version=-1))
NO = answer_of(Ack.without_version("internal error"))


class Engine:
    """The channel of one engine; `answers` come first, then it drains."""

    def __init__(self, *answers: bytes | Exception) -> None:
        self.answers = list(answers)
        self.told: list[Any] = []
        self.asked = 0

    async def ask(self, question: bytes, *, timeout_s: float) -> bytes:
        self.asked += 1
        answer = self.answers.pop(0) if self.answers else YES
        if isinstance(answer, Exception):
            raise answer
        if answer == YES:
            self.told.append(read_question(question))
        return answer


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draining, "_ASK_AGAIN_S", 0.001)


def test_every_rank_is_told_once_to_recall_and_at_the_bound_to_end() -> None:
    engines = [Engine(), Engine()]

    async def main() -> None:
        drain = Draining(engines)
        assert not drain.begun
        drain.begin(within_s=0.2)
        assert drain.begun, "requests that come now are recalled by the replica itself"
        await until(lambda: all(engine.told for engine in engines))
        assert [engine.told for engine in engines] == [[WAITING], [WAITING]]
        drain.begin(within_s=0.2)
        drain.begin(within_s=600.0)
        await until(lambda: all(len(engine.told) > 1 for engine in engines))
        drain.stop()
        assert [engine.told for engine in engines] == [[WAITING, ALL], [WAITING, ALL]]

    asyncio.run(main())


def test_the_rest_ends_before_serve_kills_the_replica() -> None:
    engine = Engine()

    async def main() -> None:
        drain = Draining([engine])
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        drain.begin(within_s=0.4)
        await until(lambda: ALL in engine.told)
        assert loop.time() - begun_s > 0.29
        drain.stop()

    asyncio.run(main())
    assert draining.ends_after_s(0.4) == pytest.approx(0.3) and draining.ends_after_s(600.0) == 595.0


def test_a_second_stop_of_the_operator_ends_at_once() -> None:
    engine = Engine()

    async def main() -> None:
        drain = Draining([engine])
        drain.begin(within_s=600.0)
        await until(lambda: engine.told)
        drain.begin(within_s=0.0)
        await until(lambda: ALL in engine.told)
        drain.stop()

    asyncio.run(main())


@pytest.mark.parametrize("trouble", [ChannelClosed("no answer"), NO, b"garbage", b"[]"], ids=str)
def test_an_engine_that_does_not_answer_is_asked_again_and_holds_up_no_other(trouble: bytes | Exception) -> None:
    silent, other = Engine(*[trouble] * 3), Engine()

    async def main() -> None:
        drain = Draining([silent, other])
        drain.begin(within_s=600.0)
        await until(lambda: other.told)
        await until(lambda: silent.told)
        assert silent.told == [WAITING] and silent.asked == 4
        drain.stop()

    asyncio.run(main())


def test_no_question_is_left_over_when_the_replica_has_gone() -> None:
    silent = Engine(*[ChannelClosed("no answer")] * 10_000)

    async def main() -> None:
        drain = Draining([silent])
        drain.begin(within_s=600.0)
        await until(lambda: silent.asked > 2)
        drain.stop()
        await asyncio.sleep(0.01)
        assert {task for task in asyncio.all_tasks() if not task.done()} == {asyncio.current_task()}

    asyncio.run(main())


def test_a_late_request_is_told_to_go_elsewhere() -> None:
    rejection = Draining([]).recall("r")
    assert rejection.kind is Kind.RECALLED and rejection.retry_after_s >= 1
