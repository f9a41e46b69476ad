"""Delivery times of tokens: the time between the engine core and the chunk that leaves the replica.

Detokenizing, the OpenAI layer, Ray's batching of a stream's chunks and the event loop they share come after the engine
core, and its records do not contain them. The replica's API process measures them where chunks leave: the delay of the
first token after the engine core, and the TPOT of the chunks.
"""

from __future__ import annotations

import contextvars
import functools
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from replicas.tracing import OFF, Tracing
from scheduler.messages import Delivered
from scheduler.rejection import Rejection

KEPT_DELIVERIES = 512
_LONGEST_DELAY_S = 60.0
"""A longer delay means two machines' clocks were compared."""
Outputs = AsyncGenerator[Any, None]


class _Delivery:
    """One request under way. Times are those of the monotonic clock, which all processes of a machine share."""

    __slots__ = ("begun_s", "computed", "context", "first_s", "last_s", "output", "rejected", "several", "tenant")

    def __init__(self, begun_s: float, tenant: str, context: Any, computed: Callable[[], None]) -> None:
        self.begun_s, self.tenant, self.context, self.computed = begun_s, tenant, context, computed
        self.rejected = ""
        self.first_s: float | None = None
        self.last_s = 0.0
        self.output: Any = None
        self.several = False


_under_way: contextvars.ContextVar[_Delivery | None] = contextvars.ContextVar("delivery", default=None)


class Deliveries:
    """The latest completed outputs with the times their tokens left, beside the engine's own times.

    observe: called with the tenant of each, the seconds it waited in the engine's queue, and its TPOT (None: a single
    token). tracing: the spans of each.
    """

    def __init__(
        self, observe: Callable[[str, float, float | None], None] = lambda *_: None,
        clock: Callable[[], float] = time.monotonic, tracing: Tracing = OFF,
    ) -> None:
        self._clock, self._observe, self._tracing = clock, observe, tracing
        self._numbers = itertools.count(1)
        self._latest: deque[Delivered] = deque(maxlen=KEPT_DELIVERIES)

    def latest(self) -> tuple[Delivered, ...]:
        """The latest, at most 512, oldest first."""
        return tuple(self._latest)

    def begin(
        self, tenant: str = "", raw_request: Any = None, computed: Callable[[], None] = lambda: None
    ) -> _Delivery:
        """Start timing a request; the engine's outputs of this context belong to it. raw_request: with its headers.
        computed: called once, when the engine has computed a prompt of it."""
        delivery = _Delivery(self._clock(), tenant, self._tracing.context_of(raw_request), computed)
        _under_way.set(delivery)
        return delivery

    async def timed(self, delivery: _Delivery, chunks: Outputs, *, streamed: bool) -> Outputs:
        """The same chunks, unchanged; records the delivery after the last one."""
        async with aclosing(chunks):
            async for chunk in chunks:
                delivery.last_s = self._clock()
                if delivery.first_s is None:
                    delivery.first_s = delivery.last_s
                yield chunk
        if delivery.rejected:
            self._tracing.rejected(delivery.context, delivery.begun_s, delivery.rejected)
        else:
            self._record(delivery, streamed)

    def _record(self, delivery: _Delivery, streamed: bool) -> None:
        stats = getattr(delivery.output, "metrics", None)
        if stats is None or delivery.several or delivery.first_s is None or not stats.first_token_ts:
            return
        first_s, last_s, delay_s = stats.first_token_ts, stats.last_token_ts, None
        if streamed:
            first_s, last_s = delivery.first_s, delivery.last_s
            delay_s = first_s - stats.first_token_ts
            delay_s = delay_s if 0 <= delay_s <= _LONGEST_DELAY_S else None
        later = stats.num_generation_tokens - 1
        tpot_s = (last_s - first_s) / later if later > 0 else None
        self._latest.append(Delivered(next(self._numbers), delay_s, tpot_s))
        self._observe(delivery.tenant, max(0.0, stats.scheduled_ts - stats.queued_ts), tpot_s)
        self._tracing.served(delivery.context, stats)


def noting(generate: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """`AsyncLLM.generate` that also stores each output with its request's delivery."""

    @functools.wraps(generate)
    async def generating(*args: Any, **kwargs: Any) -> Outputs:
        delivery = _under_way.get()
        try:
            async with aclosing(generate(*args, **kwargs)) as outputs:
                async for output in outputs:
                    if delivery is not None:
                        if delivery.output is None:
                            delivery.computed()
                        # One API request can become several engine requests; their tokens leave interleaved.
                        delivery.several |= any(choice.index for choice in output.outputs) or (
                            delivery.output is not None and delivery.output.request_id != output.request_id
                        )
                        delivery.output = output
                    yield output
        except Exception as error:
            rejection = getattr(error, "rejection", None)
            if delivery is not None and isinstance(rejection, Rejection):
                delivery.rejected = rejection.word
            raise

    return generating
