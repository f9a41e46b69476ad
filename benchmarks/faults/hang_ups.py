"""Streaming clients that all hang up at once; one that is rejected has asked again until then."""

from __future__ import annotations

import asyncio
import threading

from loadgen.client import Exchange, Server, request_body
from simulator.output.rows import REJECTED
from simulator.workload.requests import SimRequest

_PROMPT, _OUTPUT_TOKENS = list(range(300, 316)), 400  # longer than until they hang up
_START_TIMEOUT_S = 10.0
_AGAIN_S = 0.5


class HangUps:
    """`clients` streams, under way in a thread of their own from the start until `hang_up`."""

    def __init__(self, url: str, clients: int) -> None:
        self._url, self._clients = url, clients
        self._exchanges: list[Exchange] = []
        self._begun = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._stream()), daemon=True)
        self._thread.start()
        self._begun.wait(_START_TIMEOUT_S)

    async def _stream(self) -> None:
        self._loop, self._leave = asyncio.get_running_loop(), asyncio.Event()
        clock_s = self._loop.time
        async with Server(self._url) as server:
            model = await server.model(None)
            body = request_body(model.id, _PROMPT, _OUTPUT_TOKENS, declare_length=False)
            asked = SimRequest(0.0, len(_PROMPT), _OUTPUT_TOKENS, "long")

            async def keep_asking(number: int) -> None:
                while True:
                    self._exchanges[number] = one = Exchange(number, asked)
                    await server.complete(one, body, clock_s)
                    if one.outcome != REJECTED:
                        return
                    await asyncio.sleep(_AGAIN_S)

            self._exchanges = [Exchange(number, asked) for number in range(self._clients)]
            tasks = [asyncio.create_task(keep_asking(number)) for number in range(self._clients)]
            self._begun.set()
            await self._leave.wait()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def hang_up(self) -> str:
        """Close all connections; how many streams were under way, and with tokens."""
        under_way = [one for one in self._exchanges if one.ending is None]
        streaming = sum(bool(one.token_s) for one in under_way)
        self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join(_START_TIMEOUT_S)
        return f"{len(under_way)} clients left, {streaming} of them with tokens"
