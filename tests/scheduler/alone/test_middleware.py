"""The middleware around applications of our own: what passes, what waits, and what becomes a 429."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.alone import middleware as middleware_module
from scheduler.alone.middleware import RejectionMiddleware
from scheduler.rejection import Kind, Rejection
from scheduler.request_rejected import RequestRejected

REJECTION = Rejection("queue full", 7)
SSE = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-request-id", b"abc")]
JSON = [(b"content-type", b"application/json"), (b"content-length", b"2"), (b"access-control-allow-origin", b"*")]
Send = Callable[[dict[str, Any]], Awaitable[None]]


def output(rejection: Rejection | None = None, *, stop_reason: Any = None, finish_reason: str | None = None) -> Any:
    if rejection is not None:
        stop_reason, finish_reason = rejection.as_json(), "abort"
    return SimpleNamespace(outputs=[SimpleNamespace(stop_reason=stop_reason, finish_reason=finish_reason)])


class Client:
    """vLLM's engine client: `generate` yields the outputs that the test gives it."""

    def __init__(self, *outputs: Any) -> None:
        self._outputs = outputs

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        for one in self._outputs:
            yield one


def start(headers: list[tuple[bytes, bytes]], status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(text: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text, "more_body": more}


class Sent:
    """What reaches the client, and how much of it had when the application took a step."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    async def __call__(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])

    @property
    def text(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


def run(
    application: Callable[[dict[str, Any], Any, Send], Awaitable[None]], *outputs: Any, method: str = "POST",
    path: str = "/v1/chat/completions", sent: Sent | None = None,
) -> Sent:
    sent = sent or Sent()
    app = SimpleNamespace(state=SimpleNamespace(engine_client=Client(*outputs)))
    scope = {"type": "http", "method": method, "path": path, "headers": [(b"accept-encoding", b"gzip")], "app": app}

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    asyncio.run(RejectionMiddleware(application)(scope, receive, sent))
    return sent


async def whole(scope: dict[str, Any], receive: Any, send: Send) -> None:
    """As vLLM's non-streamed answers: all outputs, then one body; an error is an answer too."""
    try:
        async for _ in scope["app"].state.engine_client.generate():
            pass
    except RequestRejected as error:
        await send(start(JSON, 429))
        await send(body(str(error).encode()))
        return
    await send(start(JSON))
    await send(body(b"{}"))


async def streamed(scope: dict[str, Any], receive: Any, send: Send) -> None:
    """As vLLM's streams: the start at once, an event for each output, errors as events, and [DONE]."""
    await send(start(SSE))
    try:
        async for _ in scope["app"].state.engine_client.generate():
            await send(body(b"data: event\n\n", more=True))
    except RequestRejected as error:
        await send(body(f"data: {error}\n\n".encode(), more=True))
    await send(body(b"data: [DONE]\n\n", more=True))
    await send(body(b""))


@pytest.mark.parametrize("application", [whole, streamed])
def test_a_rejected_request_becomes_one_429(application: Any) -> None:
    sent = run(application, output(REJECTION))
    assert (sent.status, sent.headers[b"retry-after"]) == (429, b"7")
    assert len(sent.messages) == 2 and int(sent.headers[b"content-length"]) == len(sent.text)
    error = json.loads(sent.text)["error"]
    assert error == {
        "message": "rejected: queue full; retry in 7 s", "type": "rate_limit_error", "param": None, "code": 429,
    }


@pytest.mark.parametrize("kind", [Kind.RECALLED, Kind.ENDED])
@pytest.mark.parametrize("application", [whole, streamed])
def test_a_request_that_a_stopping_engine_turns_away_becomes_one_503(application: Any, kind: Kind) -> None:
    sent = run(application, output(Rejection("the engine stops", 4, kind)))
    assert (sent.status, sent.headers[b"retry-after"]) == (503, b"4")
    error = json.loads(sent.text)["error"]
    assert (error["type"], error["code"]) == ("server_error", 503) and "the engine stops" in error["message"]


def test_an_answer_that_a_stopping_engine_cuts_ends_with_an_error_event() -> None:
    sent = run(streamed, output(), output(Rejection("the engine stops", 4, Kind.ENDED)))
    assert sent.status == 200 and sent.text.startswith(b"data: event\n\n") and b"the engine stops" in sent.text


@pytest.mark.parametrize(("application", "kept"), [
    (whole, (b"access-control-allow-origin", b"*")), (streamed, (b"x-request-id", b"abc")),
])
def test_a_429_keeps_the_headers_of_other_middleware(application: Any, kept: tuple[bytes, bytes]) -> None:
    sent = run(application, output(REJECTION))
    assert kept in sent.messages[0]["headers"]
    names = [name for name, _ in sent.messages[0]["headers"]]
    assert len(set(names)) == len(names), "one length and one type"


@pytest.mark.parametrize("application", [whole, streamed])
@pytest.mark.parametrize("answer", [
    output(), output(stop_reason=REJECTION.as_json(), finish_reason="stop"),
    output(stop_reason="made up", finish_reason="abort"),
], ids=["served", "a stop string like the mark", "aborted by the server"])
def test_anything_else_passes_unchanged(application: Any, answer: Any) -> None:
    plain = Sent()

    async def inner(scope: Any, receive: Any, send: Send) -> None:
        await application(scope, receive, plain)

    run(inner, answer)
    assert run(application, answer).messages == plain.messages


def test_a_stream_passes_from_its_first_event_on() -> None:
    sent, seen = Sent(), []

    async def application(scope: Any, receive: Any, send: Send) -> None:
        await send(start(SSE))
        seen.append(len(sent.messages))
        async for _ in scope["app"].state.engine_client.generate():
            await send(body(b"data: event\n\n", more=True))
            seen.append(len(sent.messages))
        await send(body(b""))

    run(application, output(), output(), sent=sent)
    assert seen == [0, 2, 3], "the start waits for the engine's first answer, and nothing else does"


def test_events_before_the_engine_s_answer_wait_for_it() -> None:
    """The Responses API says `response.created` before it asks the engine."""

    async def application(scope: Any, receive: Any, send: Send) -> None:
        await send(start(SSE))
        await send(body(b"event: response.created\n\n", more=True))
        await streamed(scope, receive, send)

    assert run(application, output(REJECTION)).status == 429
    served = run(application, output())
    assert served.status == 200 and served.text.startswith(b"event: response.created\n\n")


def test_a_keep_alive_ends_the_wait() -> None:
    sent, seen = Sent(), []

    async def application(scope: Any, receive: Any, send: Send) -> None:
        await send(start(SSE))
        await send(body(b": keep-alive\n\n", more=True))
        seen.append(len(sent.messages))
        try:
            async for _ in scope["app"].state.engine_client.generate():
                pass
        except RequestRejected as error:
            await send(body(f"data: {error}\n\n".encode()))

    run(application, output(REJECTION), sent=sent)
    assert seen == [2] and sent.status == 200
    assert sent.text.endswith(b"data: rejected: queue full; retry in 7 s\n\n")


def test_a_rejection_after_the_first_event_stays_in_the_stream() -> None:
    """Two prompts of one completion, whose outputs come one after the other."""

    async def application(scope: Any, receive: Any, send: Send) -> None:
        await send(start(SSE))
        for client in (Client(output()), Client(output(REJECTION))):
            generate = middleware_module.telling(client.generate)
            try:
                async for _ in generate():
                    await send(body(b"data: event\n\n", more=True))
            except RequestRejected:
                await send(body(b"data: error\n\n", more=True))
        await send(body(b""))

    assert run(application).text == b"data: event\n\ndata: error\n\n"


def test_a_stream_that_asks_no_engine_is_not_held() -> None:
    sent, seen = Sent(), []

    async def application(scope: Any, receive: Any, send: Send) -> None:
        await send(start(SSE))
        seen.append(len(sent.messages))
        await send(body(b"data: stored\n\n"))

    run(application, method="GET", sent=sent)
    assert seen == [1]


def test_a_client_that_hangs_up_ends_the_request() -> None:
    closed = []

    class Endless(Client):
        async def generate(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            try:
                while True:
                    yield output()
            finally:
                closed.append(True)

    async def application(scope: Any, receive: Any, send: Send) -> None:
        from contextlib import aclosing

        scope["app"].state.engine_client = Endless()
        generate = middleware_module.telling(scope["app"].state.engine_client.generate)
        async with aclosing(generate()) as outputs:
            async for _ in outputs:
                if (await receive())["type"] == "http.disconnect":
                    break
        await send(start(JSON))

    run(application)
    assert closed == [True], "vLLM aborts a request when its generator is closed"


def test_requests_at_once_do_not_share_their_rejections() -> None:
    async def application(scope: Any, receive: Any, send: Send) -> None:
        await asyncio.sleep(0)
        await (whole if scope["path"].endswith("1") else streamed)(scope, receive, send)

    async def main() -> list[int]:
        answers = [output(REJECTION), output()]
        layer = RejectionMiddleware(application)
        sents = [Sent() for _ in range(6)]

        class Alternating:
            async def generate(self, number: int = 0) -> AsyncIterator[Any]:
                await asyncio.sleep(0.001)
                yield answers[next(numbers) % 2]

        numbers = iter(range(6))
        app = SimpleNamespace(state=SimpleNamespace(engine_client=Alternating()))
        await asyncio.gather(*(
            layer({"type": "http", "method": "POST", "path": f"/{i % 2}", "headers": [], "app": app}, None, sents[i])
            for i in range(6)
        ))
        return sorted(sent.status for sent in sents)

    assert asyncio.run(main()) == [200, 200, 200, 429, 429, 429]


def test_our_metrics_are_appended_to_vllm_s(monkeypatch: pytest.MonkeyPatch) -> None:
    async def metrics(scope: Any, receive: Any, send: Send) -> None:
        assert not any(name == b"accept-encoding" for name, _ in scope["headers"]), "the text must come as text"
        await send(start([(b"content-type", b"text/plain; version=0.0.4"), (b"content-length", b"12")]))
        await send(body(b"vllm_some 1\n"))

    async def state(self: Any) -> dict[str, Any]:
        return {"engines": {"0": {"reachable": True, "counters": {"completed": 3}}}}

    monkeypatch.setattr(middleware_module.Engines, "state", state)
    sent = run(metrics, method="GET", path="/metrics")
    assert sent.text.startswith(b"vllm_some 1\n") and b'headrace_completed_total{engine="0"} 3.0' in sent.text
    assert b"content-length" not in sent.headers

    async def openmetrics(scope: Any, receive: Any, send: Send) -> None:
        await send(start([(b"content-type", b"application/openmetrics-text"), (b"content-length", b"6")]))
        await send(body(b"# EOF\n"))

    assert run(openmetrics, method="GET", path="/metrics").text == b"# EOF\n", "another format is left alone"


def test_the_state_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    async def state(self: Any) -> dict[str, Any]:
        return {"at_unix_s": 1.0, "engines": {}}

    async def nothing(scope: Any, receive: Any, send: Send) -> None:
        raise AssertionError("not for the application")

    monkeypatch.setattr(middleware_module.Engines, "state", state)
    sent = run(nothing, method="GET", path="/headrace/state")
    assert sent.status == 200 and json.loads(sent.text) == {"at_unix_s": 1.0, "engines": {}}


def test_websockets_pass() -> None:
    seen = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope["type"], receive, send))

    asyncio.run(RejectionMiddleware(application)({"type": "websocket", "path": "/x"}, "receive", "send"))
    assert seen == [("websocket", "receive", "send")]


def test_before_the_server_says_that_it_has_ended_what_its_engines_left_is_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []

    async def cleaned() -> None:
        order.append("cleaned")

    async def application(scope: Any, receive: Any, send: Send) -> None:
        for kind in ("lifespan.startup.complete", "lifespan.shutdown.complete"):
            await send({"type": kind})

    async def send(message: dict[str, Any]) -> None:
        order.append(message["type"])

    monkeypatch.setattr(middleware_module, "remove_what_engines_left", cleaned)
    asyncio.run(RejectionMiddleware(application)({"type": "lifespan"}, None, send))
    assert order == ["lifespan.startup.complete", "cleaned", "lifespan.shutdown.complete"]
