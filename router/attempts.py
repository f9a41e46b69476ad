"""One request, tried elsewhere when its replica fails before the client has seen anything of the answer.

    replica died, or says that its engine failed     out of rotation at once; one more try
    another error of 500 and above, an exception     one more try; if that succeeds, the first replica is to blame
    given back by a replica that leaves              up to 3 more tries, and no failure
    4xx, 429                                         the answer

After the first chunk of a stream the client has part of an answer: then a failure ends the stream with an error event.
Serve's own router repeats a request only until a replica has accepted it, so neither hides nor multiplies these tries.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorResponse
from ray.serve.exceptions import DeploymentUnavailableError

from replicas.engine_health import RECALLED, REPLICA_FAILED
from replicas.failed_answers import ERROR_EVENT
from router.errors import Unavailable, failed_request
from router.limits import MAX_WAIT_S
from router.rotation import ROTATION, Rotation, Trail
from scheduler.openai_error import error_body

_MOST_FAILURES = 2
_MOST_RECALLS = 3
_RETRY_AFTER_S = 1
_NO_REPLICA = "no replica could take the request"
_CUT = "the replica that wrote this answer has failed; the answer is incomplete"
Chunks = AsyncGenerator[Any, None]
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Failed:
    """An attempt that gave the client nothing. error: what the replica answered or raised."""

    error: Any
    replica: str | None

    @property
    def kind(self) -> str:
        return str(self.error.error.type) if isinstance(self.error, ErrorResponse) else ""

    @property
    def is_recalled(self) -> bool:
        return self.kind == RECALLED

    @property
    def is_replica_s(self) -> bool:
        return self.kind == REPLICA_FAILED or isinstance(self.error, RayActorError)


@dataclass(frozen=True, slots=True)
class _Bound:
    """How long a request may wait, all its attempts together: seconds (None: without end), and until when."""

    wait_s: float | None
    until_s: float


class Attempts:
    """Tries the requests of one ingress. is_stopping: whether the application stops, so that a recalled request has
    nowhere to go."""

    def __init__(
        self, rotation: Rotation = ROTATION, *, clock: Callable[[], float] = time.monotonic,
        is_stopping: Callable[[], bool] = bool,
    ) -> None:
        self._rotation, self._clock, self._is_stopping = rotation, clock, is_stopping

    async def answer(
        self, send: Callable[[], Chunks], request_id: str, max_wait_s: float | None = MAX_WAIT_S
    ) -> Chunks:
        """The chunks of the first attempt that succeeds; `send` makes one attempt. max_wait_s: to the first token, or
        to the answer without streaming; None: without end.

        Raises:
            an HTTP 503 with `Retry-After`: no replica could take it in `max_wait_s`; an HTTP 500: it failed twice;
            an error of the request itself.
        """
        bound = _Bound(max_wait_s, math.inf if max_wait_s is None else self._clock() + max_wait_s)
        failed: list[_Failed] = []
        recalls = 0
        with self._rotation.following(request_id) as trail:
            while True:
                async with aclosing(self._attempt(send(), trail, bound)) as chunks:
                    first = await anext(chunks)
                    if not isinstance(first, _Failed):
                        self._blame(failed)
                        yield first
                        async for chunk in chunks:
                            yield chunk
                        return
                self._learn(first)
                if first.is_recalled:
                    recalls += 1
                else:
                    failed.append(first)
                if len(failed) == _MOST_FAILURES or recalls > _MOST_RECALLS or self._is_stopping():
                    yield _last_word(first)
                    return
                self._rotation.try_again(request_id)

    async def _attempt(self, chunks: Chunks, trail: Trail, bound: _Bound) -> Chunks:
        """The chunks of one attempt, or one `_Failed`."""
        ended = False
        try:
            async with aclosing(chunks):
                first = await self._first(chunks, trail, bound)
                ended = not isinstance(first, str | list)  # a stream's chunk; anything else is all there is
                yield first
                if not ended:
                    async for chunk in self._rest(chunks, trail):
                        yield chunk
            ended = True
        finally:
            if not ended and trail.cancel is not None:
                trail.cancel()  # the client has gone, or has waited too long: the engine must not work on for it

    async def _first(self, chunks: Chunks, trail: Trail, bound: _Bound) -> Any:
        left_s = bound.until_s - self._clock()
        waiting = asyncio.timeout(None if math.isinf(left_s) else max(0.0, left_s))
        try:
            async with waiting:
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return _Failed(RuntimeError("the answer has ended before it has begun"), trail.replica)
        except Exception as error:
            if waiting.expired():
                raise Unavailable(f"{_NO_REPLICA} within {bound.wait_s:g} s", _RETRY_AFTER_S) from None
            if isinstance(error, DeploymentUnavailableError):
                raise Unavailable(_NO_REPLICA, _RETRY_AFTER_S) from error
            is_its_own = trail.replica is None or getattr(error, "status_code", 500) < 500
            if is_its_own and not isinstance(error, RayActorError):
                raise
            return _Failed(error, trail.replica)
        answered = _error_in(chunk)
        return _Failed(answered, trail.replica) if answered is not None and answered.error.code >= 500 else chunk

    async def _rest(self, chunks: Chunks, trail: Trail) -> Chunks:
        """What follows the first chunk of a stream, up to the first error; a failure becomes an error event."""
        try:
            async for chunk in chunks:
                event = error_event_in(chunk)
                if event is not None and event.get("type") == REPLICA_FAILED and trail.replica is not None:
                    self._rotation.take_out(trail.replica)
                yield chunk
                if event is not None:
                    return
        except Exception as error:
            self._learn(_Failed(error, trail.replica))
            yield f"data: {json.dumps(error_body(503, _CUT))}\n\n"

    def _learn(self, failed: _Failed) -> None:
        if failed.replica is None:
            return
        if failed.is_replica_s or failed.is_recalled:
            self._rotation.take_out(failed.replica)
        if not failed.is_recalled:
            logger.warning("a request failed at replica %s: %s", failed.replica, _in_words(failed.error))

    def _blame(self, failed: list[_Failed]) -> None:
        """The request has succeeded elsewhere: what failed it before was not the request."""
        for one in failed:
            if one.replica is not None and not one.is_replica_s:
                self._rotation.doubt(one.replica)


def error_event_in(chunk: Any) -> dict[str, Any] | None:
    """The error that a chunk of a stream, one event or several, ends with."""
    events = chunk if isinstance(chunk, list) else [chunk]
    for event in events:
        if isinstance(event, str) and event.startswith(ERROR_EVENT):
            try:
                error = json.loads(event.removeprefix("data: "))["error"]
            except ValueError:
                return {}
            return error if isinstance(error, dict) else {}
    return None


async def ending_at_an_error(packets: Any) -> AsyncGenerator[Any, None]:
    """A stream's packets up to the error event in it: Ray appends `[DONE]` to every stream, a broken one too."""
    async with aclosing(packets):
        async for packet in packets:
            yield packet
            if isinstance(packet, str) and ERROR_EVENT in packet:  # quotes within an event's text are escaped
                return


def _error_in(chunk: Any) -> ErrorResponse | None:
    first = chunk[0] if isinstance(chunk, list) and chunk else chunk
    return first if isinstance(first, ErrorResponse) else None


def _last_word(failed: _Failed) -> Any:
    """What the client gets of the last attempt. Nothing of an exception's text, which names paths and addresses."""
    if failed.is_recalled or failed.is_replica_s:
        raise Unavailable(f"{_NO_REPLICA}: the ones that tried are failing or leaving", _RETRY_AFTER_S)
    if isinstance(failed.error, ErrorResponse):
        return failed.error
    raise failed_request("two replicas failed on this request; their logs say why")


def _in_words(error: Any) -> str:
    return str(error.error.message) if isinstance(error, ErrorResponse) else repr(error)
