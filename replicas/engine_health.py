"""Whether a replica's engine still works, and the end of a replica whose engine does not.

A dead engine (its process, or a worker's, is gone) is known at the first request that fails, and without requests
within half a second. A frozen engine has requests and makes no progress for `engine_timeout_s`: neither an output nor a
step of its scheduler, however long one step takes below that; or it has none, its channel is silent, and its own loop
does not answer vLLM for as long. A new engine with requests has COLD_TIMES as long: its first iterations may compile
kernels. Then the replica refuses new requests, ends what is left of its engine, so that requests under way get their
error, and ends its own process: Serve starts another in its place.
No Ray and no vLLM in here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from scheduler.messages import Stats
from scheduler.wire import QuestionFailed, UnreadableMessage

REPLICA_FAILED = "replica_failed"
"""`error.type` of an answer of a replica whose engine has failed."""
RECALLED = "recalled"
"""`error.type` of an answer of a replica that leaves and gives a request back before it has cost a token."""
ENGINE_TIMEOUT_S = 10.0
COLD_TIMES = 12.0
"""How many times the time-out an engine has for progress in its first iterations."""
COLD_ITERATIONS = 16
"""First prefills and decodes of a few sizes; kernels are compiled for each."""
_PERIOD_S = 0.5
_LONGEST_GAP_S = 2.0
"""More time between two looks says that this process was stopped, not the engine."""
_LAST_ANSWERS_S = 1.0
_LAST_BYTES_S = 0.2
logger = logging.getLogger(__name__)


class ReplicaFailed(RuntimeError):
    """The engine of this replica is dead or frozen; the message says how that was seen."""


class WatchedEngine(Protocol):
    """vLLM's client of the engines of this replica (`replicas.engine_client.EngineClient`).

    is_dead: an engine process or a worker of one is gone. requests: those that the engine of a rank has and has not
    finished.
    outputs: how often an engine has sent outputs. loop_answers: returns when the engines' own loops have answered.
    kill: end all of their processes at once, stopped ones too.
    """

    def is_dead(self) -> bool: ...
    def requests(self, rank: int) -> int: ...
    def outputs(self) -> int: ...
    async def loop_answers(self) -> None: ...
    def kill(self) -> None: ...


@dataclass(slots=True)
class _Progress:
    """Of one engine: what was seen last, the iterations that this proves, and for how many seconds nothing changed."""

    steps: tuple[str, int] | None = None
    outputs: int = -1
    iterations: int = 0
    still_s: float = 0.0


class Stillness:
    """For how long each engine of a replica has had requests and made no progress; a pure function of what is seen.

    ranks: number of engines. With one, outputs are its outputs. With several it is not known which one sent them, so
    they only stand in for a channel that answers and cannot be read.
    """

    def __init__(self, ranks: int) -> None:
        self._seen = [_Progress() for _ in range(ranks)]

    def see(self, rank: int, stats: Stats | Exception, requests: int, outputs: int, elapsed_s: float) -> float:
        """Seconds without progress of an engine, `elapsed_s` after the last look at it.

        stats: its answer, or why there is none. requests: those that it has; without any it does not step, and is not
        still.
        """
        seen = self._seen[rank]
        moved = requests == 0
        if isinstance(stats, Stats):
            moved |= seen.steps != (stats.engine_id, stats.steps)
            seen.steps = (stats.engine_id, stats.steps)
            seen.iterations = max(seen.iterations, stats.steps)
        if len(self._seen) == 1 or isinstance(stats, UnreadableMessage | QuestionFailed):
            moved |= seen.outputs != outputs
            seen.iterations = max(seen.iterations, outputs)
        seen.outputs = outputs
        seen.still_s = 0.0 if moved else seen.still_s + min(elapsed_s, _LONGEST_GAP_S)
        return seen.still_s

    def timeout_s(self, rank: int, engine_timeout_s: float) -> float:
        """Seconds without progress after which that engine is frozen."""
        return engine_timeout_s * (COLD_TIMES if self._seen[rank].iterations < COLD_ITERATIONS else 1.0)


class IdleProbe:
    """Asks engines without requests whether their own loops still run; needs a running event loop."""

    def __init__(self) -> None:
        self._asked: asyncio.Task[None] | None = None
        self._unanswered_s = 0.0

    def see(self, engine: WatchedEngine, *, doubtful: bool, elapsed_s: float) -> float:
        """Seconds for which a question has had no answer; one is asked while there is doubt."""
        if self._asked is not None and (self._asked.done() or not doubtful):
            self._asked.cancel()
            self._asked = None
        if not doubtful:
            return 0.0
        if self._asked is None:
            self._unanswered_s = 0.0
            self._asked = asyncio.get_running_loop().create_task(_quietly(engine.loop_answers()))
        else:
            self._unanswered_s += min(elapsed_s, _LONGEST_GAP_S)
        return self._unanswered_s


async def _quietly(answer: Awaitable[None]) -> None:
    with contextlib.suppress(Exception):  # an engine that has died is seen elsewhere
        await answer


class EngineHealth:
    """Watches the engines of one replica, and ends the replica when one of them fails.

    ask: the stats of a rank's engine, or an exception. end: ends this process. engine_timeout_s: may be set while it
    runs.
    """

    def __init__(
        self, ask: Callable[[int], Awaitable[Stats]], ranks: int, end: Callable[[], None], *,
        engine_timeout_s: float = ENGINE_TIMEOUT_S, clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.engine_timeout_s = engine_timeout_s
        self.failure: str | None = None
        self._ask, self._ranks, self._end = ask, ranks, end
        self._clock, self._sleep = clock, sleep
        self._stillness, self._probe = Stillness(ranks), IdleProbe()
        self._engine: WatchedEngine | None = None
        self._under_way = 0
        self._watching: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None

    def watch(self, engine: WatchedEngine) -> None:
        """Begin; called once, on the replica's event loop, when the engine has started."""
        self._engine = engine
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    def stop(self) -> None:
        """No longer watch: the replica is being stopped, and so is its engine."""
        if self._watching is not None:
            self._watching.cancel()

    def check(self) -> None:
        """Raise `ReplicaFailed` when an engine has failed; called at every failure of a request too."""
        if self.failure is None and self._engine is not None and self._engine.is_dead():
            self._fail("its engine's process or a worker of it has died")
        if self.failure is not None:
            raise ReplicaFailed(self.failure)

    @property
    def failed(self) -> bool:
        """Whether an engine has failed, as known after a look at it now."""
        with contextlib.suppress(ReplicaFailed):
            self.check()
            return False
        return True

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """A request under way: the process ends after it has got its error."""
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    async def _watch(self) -> None:
        looked_s = self._clock()
        while not self.failed:
            await self._sleep(_PERIOD_S)
            answers = await asyncio.gather(*(self._answer(rank) for rank in range(self._ranks)))
            now_s = self._clock()
            self._judge(answers, now_s - looked_s)
            looked_s = now_s

    async def _answer(self, rank: int) -> Stats | Exception:
        try:
            return await self._ask(rank)
        except Exception as error:  # whatever the channel does, an engine that serves goes on
            return error

    def _judge(self, answers: list[Stats | Exception], elapsed_s: float) -> None:
        assert self._engine is not None
        requests, outputs = [self._engine.requests(rank) for rank in range(self._ranks)], self._engine.outputs()
        for rank, answer in enumerate(answers):
            still_s = self._stillness.see(rank, answer, requests[rank], outputs, elapsed_s)
            if self.failure is None and still_s >= self._stillness.timeout_s(rank, self.engine_timeout_s):
                said = "answers its channel" if isinstance(answer, Stats) else "does not answer its channel either"
                self._fail(
                    f"its engine of rank {rank} has {requests[rank]} requests and made no progress for {still_s:.1f} s "
                    f"(engine_timeout_s = {self.engine_timeout_s:g}); it {said}"
                )
        silent = any(not isinstance(answer, Stats | UnreadableMessage | QuestionFailed) for answer in answers)
        unanswered_s = self._probe.see(self._engine, doubtful=silent and not any(requests), elapsed_s=elapsed_s)
        if self.failure is None and unanswered_s >= self.engine_timeout_s:
            self._fail(
                f"its engine has no requests and answers neither its channel nor vLLM for {unanswered_s:.1f} s "
                f"(engine_timeout_s = {self.engine_timeout_s:g})"
            )

    def _fail(self, reason: str) -> None:
        self.failure = reason
        logger.error("this replica ends and Serve replaces it: %s", reason)
        assert self._engine is not None
        self._engine.kill()  # vLLM then fails the requests under way, those of a frozen engine too
        self._leaving = asyncio.get_running_loop().create_task(self._leave())

    async def _leave(self) -> None:
        deadline_s = self._clock() + _LAST_ANSWERS_S
        while self._under_way and self._clock() < deadline_s:
            await self._sleep(0.05)
        await self._sleep(_LAST_BYTES_S)  # Ray sends an answer after it has left our hands
        self._end()
