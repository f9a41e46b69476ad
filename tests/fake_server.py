"""An OpenAI-style server in a thread; a test writes its answers line by line."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

Answer = Callable[["Call"], Awaitable[web.StreamResponse]]


class Call:
    """One completion a client asks for: its number, its body, and what a server says back."""

    def __init__(self, request: web.Request, body: dict[str, Any], number: int) -> None:
        self._request, self.body, self.number = request, body, number
        self.tokens: int = body["max_tokens"]

    async def stream(self) -> web.StreamResponse:
        """HTTP 200 and the headers of an event stream."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(self._request)
        return response

    def cut(self) -> None:
        """Close the connection under the client."""
        assert self._request.transport is not None
        self._request.transport.close()


def event(text: str | None = "a", so_far: int | None = None, finish: str | None = None, prompt: int = 0) -> bytes:
    """One event as vLLM writes it; `so_far` None: without continuous usage, `text` None: the closing usage."""
    data: dict[str, Any] = {"choices": [] if text is None else [{"index": 0, "text": text, "finish_reason": finish}]}
    if so_far is not None:
        data["usage"] = {"prompt_tokens": prompt, "completion_tokens": so_far}
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


async def answer_all(call: Call) -> web.StreamResponse:
    """Every token in an event of its own, as vLLM does."""
    response = await call.stream()
    prompt = len(call.body["prompt"])
    for number in range(1, call.tokens + 1):
        await response.write(event("a", number, "length" if number == call.tokens else None, prompt))
    await response.write(event(None, call.tokens, prompt=prompt))
    await response.write(DONE)
    return response


class FakeServer:
    """Serves on a free port of 127.0.0.1 while the block lasts. `calls` are the bodies it got, `keys` the API keys."""

    def __init__(self, answer: Answer = answer_all, models: tuple[str, ...] = ("tiny", "large"), **card: Any) -> None:
        self._answer, self._models, self._card = answer, models, card
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.calls: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = ""

    def __enter__(self) -> FakeServer:
        self._thread.start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._list)
        app.router.add_post("/v1/completions", self._complete)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name} | self._card for name in self._models]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        self.calls.append(await request.json())
        self.keys.append(request.headers.get("Authorization"))
        return await self._answer(Call(request, self.calls[-1], len(self.calls)))
