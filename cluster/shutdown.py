"""Stopping an application: no request more, those that have begun finish, and nothing is left behind.

The ingress turns new requests away, and the replicas send back what has not begun. What has not finished within the
bound, or when the operator asks again, ends with an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import psutil

from cluster.processes import end_processes
from replicas.draining import ends_after_s
from scheduler.engine import segments

_POLL_S = 0.25
_SAY_EVERY_S = 5.0
_TO_TELL_CLIENTS_S = 5.0
Say = Callable[[str], None]


class Signals:
    """A signal handler: the first signal raises KeyboardInterrupt, each later one only sets `again`.

    A terminal that goes away (SIGHUP) stops as Ctrl-C does, but hurries nothing and cuts short no stop under way: a
    half-stopped application would answer nothing and not start again.
    """

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, number: int = signal.SIGINT, *_: Any) -> None:
        if number == signal.SIGHUP and self._count:
            return
        self._count += 1
        if self._count == 1:
            raise KeyboardInterrupt

    def install(self) -> None:
        """Handle SIGINT (Ctrl-C), SIGTERM and, unless it is ignored as under nohup, SIGHUP from now on."""
        signal.signal(signal.SIGINT, self)
        signal.signal(signal.SIGTERM, self)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self)

    def stopping(self) -> None:
        """The stop has begun, for whatever reason."""
        self._count = max(1, self._count)

    @property
    def again(self) -> bool:
        """Whether the operator has asked again, and the stop must not wait."""
        return self._count > 1


def finish_requests(app_name: str, within_s: float, say: Say, at_once: Callable[[], bool]) -> int:
    """Let the application's requests finish, and end the rest; returns how many were cut. Needs a connection to Ray.

    within_s: bound in seconds; at_once: asked all the time whether to end the rest now.
    """
    from replicas.actor_calls import call_replica, ingress_ids, replica_ids

    under_way = UnderWay()

    async def stop_admitting() -> int:
        names = (await asyncio.to_thread(ingress_ids, app_name)).values()
        answers = await _answers({name: call_replica(name, "stop_admitting", timeout_s=2.0) for name in names})
        return under_way.heard(answers)

    async def drain(within_s: float) -> None:
        names = (await asyncio.to_thread(replica_ids, app_name)).values()
        await _answers({name: call_replica(name, "drain", timeout_s=2.0, within_s=within_s) for name in names})

    return asyncio.run(_finish(stop_admitting, drain, within_s, say, at_once))


class UnderWay:
    """Requests under way at the ingresses. One that is too busy to answer has as many as it said last, and one if it
    has never answered: those with most to finish answer last. One that is gone has none."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def heard(self, answers: dict[str, int | None]) -> int:
        """The sum. answers: by ingress, of all there are; None: it did not answer."""
        self._last = {
            name: self._last.get(name, 1) if answer is None else answer for name, answer in answers.items()
        }
        return sum(self._last.values())


async def _finish(
    stop_admitting: Callable[[], Awaitable[int]], drain: Callable[[float], Awaitable[None]], within_s: float, say: Say,
    at_once: Callable[[], bool],
) -> int:
    left = await stop_admitting()
    await drain(within_s)
    deadline_s, said, said_s = time.monotonic() + ends_after_s(within_s), left, time.monotonic()
    if left:
        say(f"finishing {left} requests, at most {within_s:g} s; Ctrl-C again ends at once")
    while left and not at_once() and time.monotonic() < deadline_s:
        await asyncio.sleep(_POLL_S)
        left = await stop_admitting()
        if left != said and time.monotonic() - said_s > _SAY_EVERY_S:
            said, said_s = left, time.monotonic()
            say(f"finishing {left} requests")
    if not left:
        return 0
    cut = left
    await drain(0.0)
    told_s = time.monotonic() + _TO_TELL_CLIENTS_S
    while left and time.monotonic() < told_s:
        await asyncio.sleep(_POLL_S)
        left = await stop_admitting()
    say(f"ended {cut} requests before they were complete")
    return cut


async def _answers(calls: dict[str, Awaitable[Any]]) -> dict[str, Any]:
    """What was answered, by replica; None: it did not answer."""
    from replicas.actor_calls import ReplicaUnavailable

    found = await asyncio.gather(*calls.values(), return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException) and not isinstance(one, ReplicaUnavailable):
            raise one
    return {name: None if isinstance(one, BaseException) else one for name, one in zip(calls, found, strict=True)}


def stop_local_ray(serve: Any, ray: Any) -> None:
    """Stop Serve and the Ray that this process started, every process of it, and the shared memory they leave."""
    ours = psutil.Process().children(recursive=True)
    shared = segments.mapped_by(process.pid for process in ours)
    with contextlib.suppress(Exception):  # if this fails, the processes below are still ended
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
    end_processes(ours)
    segments.remove(shared)
