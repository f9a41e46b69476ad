"""What each replica's engines answered last, asked in the background: for readiness, and for what must not wait.

Every engine is asked by a task of its own, once the earlier answer is there: a silent one delays no other, and
questions to it do not pile up. No Ray in here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from replicas.ranks import EngineAddress, replica_of
from scheduler.messages import Stats
from scheduler.wire import OtherSchema

PERIOD_S = 0.5
FRESH_S = 3.0
"""An engine whose last answer is older does not count as ready."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """The latest of one engine. model: the model's id. stats: its last answer; None: none yet. reason: why the latest
    question has no answer. age_s: seconds since the last answer; None: none."""

    name: str
    model: str
    stats: Stats | None
    reason: str | None
    age_s: float | None

    @property
    def is_ready(self) -> bool:
        """Whether the engine has answered in the last few seconds."""
        return self.age_s is not None and self.age_s <= FRESH_S


@dataclass(slots=True)
class _Known:
    address: EngineAddress
    task: asyncio.Task[None] | None = None
    stats: Stats | None = None
    reason: str | None = "not asked yet"
    answered_s: float | None = None

    @property
    def model(self) -> str:
        return self.address.model_id


class ReplicaWatch:
    """Keeps the latest answer of every engine.

    engines: the addresses by name; blocks, so it is called in a thread. ask: one question, which gives up by itself or
    not at all. `revision` is another one whenever an answer has changed.
    """

    def __init__(
        self, engines: Callable[[], Mapping[str, EngineAddress]], ask: Callable[[EngineAddress], Awaitable[Stats]], *,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._engines, self._ask = engines, ask
        self._clock, self._sleep = clock, sleep
        self._known: dict[str, _Known] = {}
        self.revision = 0

    def latest(self) -> Mapping[str, Report]:
        """The latest of every engine that there is, by name."""
        now_s = self._clock()

        def age_s(one: _Known) -> float | None:
            return None if one.answered_s is None else now_s - one.answered_s

        return {
            name: Report(name, one.address.model_id, one.stats, one.reason, age_s(one))
            for name, one in self._known.items()
        }

    def answers(self) -> Collection[_Known]:
        """The same as it is kept, when each came and not how old it is: at once, for what every request asks."""
        return self._known.values()

    async def run(self) -> None:
        """Follow which engines there are, and ask each of them; until cancelled."""
        try:
            while True:
                try:
                    self._follow(await asyncio.to_thread(self._engines))
                except Exception:  # Ray's own store may be away for a while; the known ones are still asked
                    logger.exception("cannot list the replicas; trying again")
                await self._sleep(PERIOD_S)
        finally:
            self._follow({})

    def _follow(self, engines: Mapping[str, EngineAddress]) -> None:
        for name in self._known.keys() - engines.keys():
            self.revision += 1
            task = self._known.pop(name).task
            if task is not None:
                task.cancel()
        for name, address in engines.items():
            if name not in self._known:
                self.revision += 1
                one = self._known[name] = _Known(address)
                one.task = asyncio.get_running_loop().create_task(self._keep_asking(one))

    async def _keep_asking(self, one: _Known) -> None:
        while True:
            try:
                one.stats, one.reason = await self._ask(one.address), None
                one.answered_s = self._clock()
            except OtherSchema as error:  # a replica of another release serves requests
                one.reason, one.answered_s = str(error), self._clock()
            except Exception as error:  # the replica is starting, silent or gone
                one.reason = str(error)
            self.revision += 1
            await self._sleep(PERIOD_S)


def readiness(reports: Collection[Report], models: Collection[str]) -> dict[str, Any]:
    """The body of `/readyz`: the number of replicas, of those with an engine that answers, and the models without one.

    models: their ids. The application is ready while one model is.
    """
    ready = {replica_of(report.name) for report in reports if report.is_ready}
    served = {report.model for report in reports if report.is_ready}
    return {
        "status": "ready" if ready else "not ready",
        "ready": len(ready),
        "replicas": len({replica_of(report.name) for report in reports}),
        "models_without_replica": sorted(set(models) - served),
    }
