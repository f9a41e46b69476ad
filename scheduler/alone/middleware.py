"""`RejectionMiddleware`: what vLLM's own server needs around it to speak of rejections, thresholds and load.

    vllm serve MODEL --scheduler-cls headrace.HeadraceScheduler --middleware headrace.RejectionMiddleware

A rejected request becomes HTTP 429 with `Retry-After`, streamed or not. `GET /metrics` has the engines' metrics beside
vLLM's own, `GET /headrace/state` says what the engines know. Like `/metrics`, both are open when vLLM has an API key.

The engine core rejects a request by an empty output, of which a stream of vLLM's shows nothing. So the rejection is
taken where the server asks the engine for outputs: `generate` of its engine client (`app.state.engine_client`). No body
is read, and what a client sends or a model writes is never taken for a rejection. These names of vLLM's are fenced by
`tests/scheduler/alone/test_frontend_seam.py`.

Imports neither Ray nor torch: vLLM loads this module by name when it builds its server.
"""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from scheduler.alone.place import remove_what_engines_left
from scheduler.alone.state import Engines
from scheduler.openai_error import error_body
from scheduler.rejection import Rejection

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
_Headers = list[tuple[bytes, bytes]]

STATE_PATH, METRICS_PATH = "/headrace/state", "/metrics"
_START, _BODY = "http.response.start", "http.response.body"
_STREAM = b"text/event-stream"
_COMMENT = b":"
"""How a server-sent comment begins: vLLM's keep-alive for a stream whose first token is far."""
_OF_A_BODY = frozenset({b"content-length", b"content-type", b"transfer-encoding"})


@dataclass(slots=True)
class _Outcome:
    """What the engine has answered to one HTTP request so far."""

    begun: bool = False
    rejection: Rejection | None = None


_outcome: ContextVar[_Outcome | None] = ContextVar("headrace_outcome", default=None)


class RejectionMiddleware:
    """Pure ASGI middleware for vLLM's `--middleware`. app: the application that it wraps."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._client: Any = None
        self._engines = Engines()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry point."""
        path = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else ""
        if path == STATE_PATH:
            await _answer_json(send, HTTPStatus.OK, await self._engines.state())
        elif path == METRICS_PATH:
            await self._app(_uncompressed(scope), receive, _Appending(send, self._metrics))
        elif scope.get("method") == "POST":
            self._watch(scope)
            outcome = _Outcome()
            token = _outcome.set(outcome)
            try:
                await self._app(scope, receive, _Answer(outcome, send))
            finally:
                _outcome.reset(token)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, functools.partial(_cleaning_up, send))
        else:
            await self._app(scope, receive, send)

    async def _metrics(self) -> bytes:
        from scheduler.alone.metrics import exposition  # prometheus_client must see vLLM's multi-process folder first

        return exposition(await self._engines.state())

    def _watch(self, scope: Scope) -> None:
        """Have the server's engine client tell rejections; it exists once the server has started."""
        client = getattr(getattr(scope.get("app"), "state", None), "engine_client", None)
        if client is not None and client is not self._client:
            client.generate = telling(client.generate)
            self._client = client


def telling(generate: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    """The engine client's `generate`; it tells the HTTP request that it runs for what becomes of it, and raises
    `RequestRejected`."""
    from scheduler.request_rejected import RequestRejected, raising_rejections  # imports vLLM

    raising = raising_rejections(generate)

    @functools.wraps(generate)
    async def generating(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        outcome = _outcome.get() or _Outcome()
        try:
            async with aclosing(raising(*args, **kwargs)) as outputs:
                async for output in outputs:
                    outcome.begun = True
                    yield output
        except RequestRejected as error:
            outcome.rejection = error.rejection
            raise RequestRejected(error.rejection, error.rejection.text) from None

    return generating


@dataclass(slots=True)
class _Answer:
    """Passes an answer on, or sends the rejection in its place.

    A stream is held until the engine has answered, which is before its first event: vLLM's own events come later, but
    for the Responses API, whose first ones precede the engine's answer, and comments, which end the wait.
    """

    outcome: _Outcome
    send: Send
    held: list[Message] = field(default_factory=list)
    passing: bool = False
    over: bool = False

    async def __call__(self, message: Message) -> None:
        if self.over:
            return  # what vLLM says of the rejection after it
        if self.passing:
            await self.send(message)
        elif self.outcome.rejection is not None:
            self.over = True
            start = self.held[0] if self.held else message
            await _reject(self.send, self.outcome.rejection, start.get("headers", ()))
        else:
            self.held.append(message)
            if not self._must_wait(message):
                self.passing = True
                for one in self.held:
                    await self.send(one)
                self.held.clear()

    def _must_wait(self, message: Message) -> bool:
        if message["type"] == _START:
            return any(name.lower() == b"content-type" and _STREAM in value for name, value in message["headers"])
        is_comment = message.get("body", b"").startswith(_COMMENT)
        return not self.outcome.begun and not is_comment and message.get("more_body", False)


@dataclass(slots=True)
class _Appending:
    """Passes an answer in plain text on, and appends `more` to its body."""

    send: Send
    more: Callable[[], Awaitable[bytes]]
    appends: bool = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == _START:
            headers = message.get("headers", ())
            plain = any(name == b"content-type" and value.startswith(b"text/plain") for name, value in headers)
            self.appends = plain and message["status"] == HTTPStatus.OK
            if self.appends:
                message = {**message, "headers": [one for one in headers if one[0] != b"content-length"]}
        elif self.appends and message["type"] == _BODY and not message.get("more_body", False):
            message = {**message, "body": message.get("body", b"") + await self.more()}
        await self.send(message)


async def _cleaning_up(send: Send, message: Message) -> None:
    """Passes on what the application says of its start and end. vLLM's server ends its engines before itself, and waits
    for this last message only."""
    if message["type"] == "lifespan.shutdown.complete":
        await remove_what_engines_left()
    await send(message)


def _uncompressed(scope: Scope) -> Scope:
    headers = [(name, value) for name, value in scope.get("headers", ()) if name != b"accept-encoding"]
    return {**scope, "headers": headers}


async def _reject(send: Send, rejection: Rejection, headers: Iterable[tuple[bytes, bytes]]) -> None:
    """The rejection's HTTP status (429; 503 from an engine that stops) with the answer's own further headers (CORS,
    request id)."""
    kept = [(name, value) for name, value in headers if name.lower() not in _OF_A_BODY]
    retry = (b"retry-after", str(rejection.retry_after_s).encode())
    status = rejection.kind.http_status
    await _answer_json(send, status, error_body(status, rejection.text), [*kept, retry])


async def _answer_json(send: Send, status: HTTPStatus, content: Any, headers: _Headers | None = None) -> None:
    body = json.dumps(content).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": _START, "status": int(status), "headers": [*own, *(headers or [])]})
    await send({"type": _BODY, "body": body})
