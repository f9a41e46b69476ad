"""How each HTTP request for generation ends, and how long it takes, for the metrics. No Ray.

    completed    a whole answer
    rejected     429, with the reason: too_late, queue_full, front_door, key_limit
    refused      another 4xx, with its status
    unavailable  503
    failed       another 5xx, with its status; an answer cut by an error event, or by an exception, with its name
    hung_up      the client has gone before the end of its answer
"""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from replicas.tracing import OFF, Note, Tracing
from scheduler.metrics import (
    CONTROLLER_UP,
    HTTP_IN_FLIGHT,
    HTTP_REQUESTS,
    HTTP_STARTED,
    NO_METER,
    REQUEST_SECONDS,
    TTFT_SECONDS,
    UNKNOWN,
    Meter,
)

REASON = "reason"
"""Where, in a request's state, the handler of an engine's rejection leaves the reason."""
_CANCELLED = frozenset({"CancelledError", "ClientDisconnect", "RequestCancelledError", "TaskCancelledError"})
"""What asyncio, Starlette, Serve and Ray raise when a client has gone."""
_ERROR_EVENT, _DONE = b'data: {"error":', b"\ndata: [DONE]"


class Outcomes:
    """The requests of one ingress, and what it knows of the controller. clock: seconds. tracing: their spans.

    controller_up: whether it answered when last asked; None: there is none to ask.
    """

    def __init__(
        self, meter: Meter = NO_METER, clock: Callable[[], float] = time.monotonic, tracing: Tracing = OFF
    ) -> None:
        self.meter, self.clock, self.tracing = meter, clock, tracing
        self.in_flight = 0
        self.controller_up: bool | None = None

    async def tell(self) -> None:
        """Record the gauges, which are forgotten unless they are recorded again."""
        self.meter.record(HTTP_IN_FLIGHT, self.in_flight, {})
        if self.controller_up is not None:
            self.meter.record(CONTROLLER_UP, self.controller_up, {})


class Watched:
    """One request, from its headers to its end: a context around whatever answers it.

    model, tenant: once they are known. reason: of a refusal in the ingress. note: told of all that at the end.
    """

    def __init__(self, outcomes: Outcomes, state: dict[str, Any], note: Note = lambda _: None) -> None:
        self._outcomes, self._state, self._note = outcomes, state, note
        self._begun_s = outcomes.clock()
        self._status, self._streams, self._failed, self._whole, self._gone = 0, False, False, False, False
        self._first_s: float | None = None
        self.model, self.tenant, self.reason = UNKNOWN, UNKNOWN, ""

    def __enter__(self) -> Watched:
        self._outcomes.in_flight += 1
        self._outcomes.meter.record(HTTP_STARTED, 1, {})
        return self

    def hearing(self, receive: Any) -> Any:
        """An ASGI `receive` that also notes when the client has gone."""

        async def heard() -> Any:
            message = await receive()
            self._gone |= message["type"] == "http.disconnect"
            return message

        return heard

    def noting(self, send: Any) -> Any:
        """An ASGI `send` that also notes what goes out."""

        async def noted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
                kinds = [value for name, value in message.get("headers", ()) if name.lower() == b"content-type"]
                self._streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
            elif message["type"] == "http.response.body":
                self._note_body(message)
            await send(message)

        return noted

    def _note_body(self, message: Any) -> None:
        body = message.get("body", b"")
        if body and self._first_s is None:
            self._first_s = self._outcomes.clock()
        self._failed |= self._streams and _ERROR_EVENT in body
        # Clients hang up as soon as they have read the last event.
        self._whole |= not message.get("more_body", False) or (self._streams and _DONE in b"\n" + body)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        outcomes = self._outcomes
        outcomes.in_flight -= 1
        outcome, reason = self._outcome(kind)
        of_request = {"model": self.model, "tenant": self.tenant}
        ended = of_request | {"outcome": outcome, "reason": reason}
        outcomes.meter.record(HTTP_REQUESTS, 1, ended)
        self._note(ended)
        if outcome == "completed":
            outcomes.meter.record(REQUEST_SECONDS, outcomes.clock() - self._begun_s, of_request)
            if self._streams and self._first_s is not None:
                outcomes.meter.record(TTFT_SECONDS, self._first_s - self._begun_s, of_request)

    def _outcome(self, kind: type[BaseException] | None) -> tuple[str, str]:
        """The outcome, and the reason where there is one."""
        cancelled = kind is not None and kind.__name__ in _CANCELLED
        if not self._whole and (self._gone or cancelled):
            return "hung_up", ""
        if (kind is not None and not cancelled) or self._failed:
            return "failed", "error_event" if self._failed or kind is None else kind.__name__
        if not self._whole:
            return "hung_up", ""
        status = self._status
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            return "rejected", self.reason or self._state.get(REASON, "other")
        if status < HTTPStatus.BAD_REQUEST:
            return "completed", ""
        if status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return "refused", f"http_{status}"
        return ("unavailable" if status == HTTPStatus.SERVICE_UNAVAILABLE else "failed"), f"http_{status}"
