"""Tells the controller what the engines of one replica have seen: one small message for all of them, once a period.

The replica sends it by itself, to the controller's actor. A question of the controller would be a Serve request of this
replica: it would wait behind the requests of a full one, and count among them. The answer says when to report next, by
which settings to digest, and, for policies that need records, which are known. Without a controller, or when a message
is lost, the next one says the same and what is new.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter

from replicas.digester import Digester
from scheduler.messages import Ack, Delivered, Telemetry
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.tuning.settings import TuningSettings
from scheduler.wire import QuestionFailed, UnreadableMessage, answer_of, read_answer, telemetry_question

RETRY_S = 1.0
_LEAST_S, _MOST_S = 0.05, 3600.0
_LAW: TypeAdapter[IterationTimeModel] = TypeAdapter(IterationTimeModel)
logger = logging.getLogger(__name__)
Send = Callable[[dict[str, bytes], bool], Awaitable[dict[str, Any]]]
"""Sends the reports by engine, and whether they are urgent; gives the controller's wishes. Raises without one."""


class Reporter:
    """Reports of the engines of one replica.

    names: of the engines, by rank. ask: a question to the engine of a rank, as `scheduler.wire` writes it. delivered:
    the latest deliveries, of a replica with one engine.
    """

    def __init__(
        self, names: Sequence[str], ask: Callable[[int, bytes], Awaitable[bytes]],
        delivered: Callable[[], Sequence[Delivered]], send: Send,
    ) -> None:
        self._names, self._ask, self._delivered, self._send = names, ask, delivered, send
        self._digesters = [Digester() for _ in names]
        self._digests: list[bool | None] = [None] * len(names)
        self._wishes: dict[str, Any] | None = None
        self._soon = asyncio.Event()
        self._said = ""

    def soon(self) -> None:
        """Something has changed that the controller should know at once, such as the settings in force."""
        self._soon.set()

    async def keep_reporting(self) -> None:
        """Until cancelled; a failure is logged once and tried again."""
        urgent = True
        while True:
            urgent |= self._soon.is_set() or self._wishes is None
            self._soon.clear()
            try:
                wait_s = await self.report(urgent=urgent)
                urgent, self._said = False, ""
            except Exception as error:  # no controller yet, or between two: nothing here depends on it
                wait_s = RETRY_S
                said, self._said = self._said, repr(error)
                if said != self._said:
                    logger.info("no report to the controller, trying again: %s", self._said)
            try:
                await asyncio.wait_for(self._soon.wait(), wait_s)
            except TimeoutError:
                continue

    async def report(self, *, urgent: bool = False) -> float:
        """One message; returns the seconds until the next. The first one asks for the controller's wishes alone."""
        first = self._wishes is None
        if first:
            self._wishes = await self._send({}, False)
        reports = {}
        for rank, name in enumerate(self._names):
            reports[name] = await self._of(rank, name)
        self._wishes = await self._send(reports, urgent)
        return min(max(float(self._wishes["next_s"]), _LEAST_S), _MOST_S)

    async def _of(self, rank: int, name: str) -> bytes:
        """The report of one engine; an `Ack` with the reason where there is none."""
        assert self._wishes is not None
        try:
            telemetry = await self._telemetry(rank, name)
            return await asyncio.to_thread(self._digested, rank, telemetry, self._wishes)
        except (QuestionFailed, UnreadableMessage) as error:
            return answer_of(Ack.without_version(str(error)))
        except Exception as error:  # the other engines' reports are as good as ever
            return answer_of(Ack.without_version(repr(error)))

    async def _telemetry(self, rank: int, name: str) -> Telemetry:
        assert self._wishes is not None
        if self._digests[rank] is None:
            self._digests[rank] = Digester.can_digest(await self._read(rank, None))
        cursor = self._digesters[rank].cursor if self._digests[rank] else int(self._wishes["cursors"].get(name, 0))
        telemetry = await self._read(rank, cursor)
        if len(self._names) == 1:  # deliveries are not known by rank
            telemetry = replace(telemetry, delivered=tuple(self._delivered()))
        return telemetry

    async def _read(self, rank: int, cursor: int | None) -> Telemetry:
        return read_answer(await self._ask(rank, telemetry_question(cursor)), Telemetry)

    def _digested(self, rank: int, telemetry: Telemetry, wishes: dict[str, Any]) -> bytes:
        digests = Digester.can_digest(telemetry)
        if digests != self._digests[rank]:  # another policy since: its records are known from the next report on
            self._digests[rank], self._digesters[rank] = digests, Digester()
            digests = False
        if digests:
            law = wishes.get("profile")
            telemetry = self._digesters[rank].digested(
                telemetry, TuningSettings(**wishes["tuning"]), None if law is None else _LAW.validate_python(law)
            )
        return answer_of(telemetry)
