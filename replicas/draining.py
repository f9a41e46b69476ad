"""The drain of one replica, from Serve's graceful shutdown or an operator's stop until it is gone.

Every engine is told to drain, again and again until it answers: what has not begun goes back to the ingress, what has
begun is finished. Shortly before the bound the engines are told to end the rest with an error, which still reaches the
clients before Serve kills the replica. A silent engine delays nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Sequence
from typing import Protocol

from scheduler.engine.channel import ChannelClosed
from scheduler.messages import Ack
from scheduler.rejection import Kind, Rejection
from scheduler.wire import UnreadableMessage, drain_question, read_answer

_ASK_AGAIN_S = 1.0
_ANSWER_S = 4.0
_TO_TELL_CLIENTS_S = 5.0
_RETRY_AFTER_S = 5.0
logger = logging.getLogger(__name__)


def ends_after_s(within_s: float) -> float:
    """Seconds after which the rest is ended, so that its clients hear of it before `within_s` is over."""
    return max(0.0, within_s - min(_TO_TELL_CLIENTS_S, within_s / 4))


class Channel(Protocol):
    """The control channel of one engine (`ChannelClient`)."""

    async def ask(self, question: bytes, *, timeout_s: float) -> bytes: ...


class Draining:
    """The drain of one replica's engines; `begun` from the first call of `begin` on."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        self._channels = channels
        self._recalls: asyncio.Task[object] | None = None
        self._end: asyncio.Task[None] | None = None
        self._ends_at_s = math.inf

    @property
    def begun(self) -> bool:
        """Whether new requests go elsewhere."""
        return self._recalls is not None

    def begin(self, within_s: float) -> None:
        """Drain, and end in `within_s` seconds what has not finished by then. A later call may only shorten that."""
        loop = asyncio.get_running_loop()
        if self._recalls is None:
            logger.info("the replica stops: requests that have begun have %g s to finish", within_s)
            self._recalls = loop.create_task(self._tell_all(end=False))
        ends_at_s = loop.time() + ends_after_s(within_s)
        if ends_at_s < self._ends_at_s:
            if self._end is not None:
                self._end.cancel()
            self._ends_at_s = ends_at_s
            self._end = loop.create_task(self._end_at(ends_at_s))

    def recall(self, request_id: str) -> Rejection:
        """What a request is told that comes now."""
        return Rejection.for_drain_time("the replica is stopping", _RETRY_AFTER_S, request_id, Kind.RECALLED)

    async def _end_at(self, at_s: float) -> None:
        await asyncio.sleep(at_s - asyncio.get_running_loop().time())
        await self._tell_all(end=True)

    async def _tell_all(self, *, end: bool) -> None:
        await asyncio.gather(*(self._tell(rank, channel, end) for rank, channel in enumerate(self._channels)))

    async def _tell(self, rank: int, channel: Channel, end: bool) -> None:
        told_of = False
        while True:
            try:
                ack = read_answer(await channel.ask(drain_question(end=end), timeout_s=_ANSWER_S), Ack)
            except (ChannelClosed, UnreadableMessage) as error:
                if not told_of:
                    logger.warning("the engine of rank %d does not drain yet: %s", rank, error)
                told_of = True
            else:
                if ack.accepted:
                    return
                logger.warning("the engine of rank %d does not drain: %s", rank, ack.reason)
            await asyncio.sleep(_ASK_AGAIN_S)

    def stop(self) -> None:
        """The replica is gone: ask no more."""
        for task in (self._recalls, self._end):
            if task is not None:
                task.cancel()
