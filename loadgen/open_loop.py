"""Open loop: every request is sent when it is due, whether or not the ones before it are answered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

import numpy as np

from loadgen.client import TIMED_OUT, Exchange, Server, request_body
from simulator.workload.requests import SimRequest

# Above the special and byte tokens, below the smallest vocabulary of a usual model (32 000).
_LOWEST_TOKEN, _BEYOND_TOKEN = 300, 30_000

OnChange = Callable[[Exchange], None]


class OpenLoop:
    """One measurement. `exchanges` are the requests sent so far, in the order they arrived.

    timeout_s: seconds after its arrival at which a request times out. on_change: called with every request when it is
    sent and again when it has ended (`ended_s` is then set).
    """

    def __init__(
        self, server: Server, model: str, *, timeout_s: float, declare_lengths: bool = False,
        on_change: OnChange = lambda _: None,
    ) -> None:
        self._server, self._model = server, model
        self._timeout_s, self._declare_lengths, self._on_change = timeout_s, declare_lengths, on_change
        # New prompts in every run, whatever the seed, so that no prefix cache holds them.
        self._rng = np.random.default_rng()
        self._begun = 0.0
        self.exchanges: list[Exchange] = []

    def now_s(self) -> float:
        """Seconds since the measurement began."""
        return asyncio.get_running_loop().time() - self._begun

    async def run(self, requests: Iterable[SimRequest]) -> bool:
        """Send all requests and wait for them; False if cancelled, which ends the requests under way."""
        self._begun = asyncio.get_running_loop().time()
        tasks: list[asyncio.Task[None]] = []
        try:
            for index, request in enumerate(requests):
                body = self._body(request)  # before it is due, so that it leaves on time
                await asyncio.sleep(request.arrival_s - self.now_s())
                exchange = Exchange(index, request)
                self.exchanges.append(exchange)
                tasks.append(asyncio.create_task(self._exchange(exchange, body)))
            await asyncio.gather(*tasks)
            return True
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return False

    def _body(self, request: SimRequest) -> bytes:
        prompt = self._rng.integers(_LOWEST_TOKEN, _BEYOND_TOKEN, request.prompt_tokens).tolist()
        return request_body(self._model, prompt, request.output_tokens, declare_length=self._declare_lengths)

    async def _exchange(self, exchange: Exchange, body: bytes) -> None:
        self._on_change(exchange)
        try:
            async with asyncio.timeout_at(self._begun + exchange.asked.arrival_s + self._timeout_s):
                await self._server.complete(exchange, body, self.now_s)
        except TimeoutError:
            exchange.outcome = TIMED_OUT
            exchange.message = f"not complete {self._timeout_s:g} s after its arrival"
        finally:
            exchange.ended_s = self.now_s()
            self._on_change(exchange)


def allow_many_connections() -> None:
    """Raise the soft limit of open files to the hard one: every request under way is a connection."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows; not everywhere allowed
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
