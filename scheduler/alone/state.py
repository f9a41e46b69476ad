"""What the engines behind an API server, and their controller processes, know: asked when a reader asks for it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import psutil
from pydantic_core import from_json

from scheduler.alone.place import engines_here, state_file
from scheduler.engine.channel import ChannelClient, ChannelClosed
from scheduler.wire import UnreadableMessage

_ANSWER_S = 1.0
"""Longer than an iteration, shorter than a scrape's timeout."""
_SILENT_PERIODS = 3.0
_NOTHING = {"time_model": None, "fluid": None, "forecast": None, "decision": "the controller has not started yet"}


class Engines:
    """The engines of this server; for use within one event loop."""

    def __init__(self) -> None:
        self._channels: dict[str, ChannelClient] = {}

    async def state(self) -> dict[str, Any]:
        """The state of every engine by data-parallel rank, with the keys of a replica in `/admin/state`, and of its
        controller process. An engine that does not answer within a second is listed with the reason."""
        places = engines_here()
        for endpoint in self._channels.keys() - set(places.values()):
            self._channels.pop(endpoint).close()
        answers = await asyncio.gather(*(self._of_engine(endpoint) for endpoint in places.values()))
        return {"at_unix_s": time.time(), "engines": dict(zip(map(str, places), answers, strict=True))}

    async def _of_engine(self, endpoint: str) -> dict[str, Any]:
        controller = controller_state(endpoint)
        try:
            channel = self._channels.setdefault(endpoint, ChannelClient(endpoint))
            report = await channel.report(None, timeout_s=_ANSWER_S)
        except (ChannelClosed, UnreadableMessage) as error:
            return {"reachable": False, "reason": str(error), **controller}
        return {"reachable": True, **report.shown(), **controller}


def controller_state(endpoint: str) -> dict[str, Any]:
    """What the controller process of the engine at `endpoint` wrote last: its estimates, and in `controller` itself:
    `alive`, and how old this is (`age_s`)."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        written = from_json(state_file(endpoint).read_bytes())
        controller = written["controller"]
        age_s = time.time() - controller["at_unix_s"]
        alive = psutil.pid_exists(controller["pid"]) and age_s < _SILENT_PERIODS * max(controller["period_s"], 1.0)
        return {**written["engine"], "controller": {"alive": alive, "age_s": age_s, **controller}}
    return {**_NOTHING, "controller": {"alive": False}}
