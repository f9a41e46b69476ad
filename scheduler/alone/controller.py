"""The controller process of one engine without a cluster: the rule of the cluster's controller, for this engine alone.

Started beside the engine core by `scheduler.alone.keeper`, which writes the settings to its standard input. The end of
that input is the end of the engine core, however it came, and then of this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections import deque
from typing import Any

from pydantic_core import to_json

from scheduler.alone.place import write_state
from scheduler.engine.channel import ChannelClient, ChannelClosed, remove_endpoint
from scheduler.messages import Telemetry
from scheduler.model.profiles import load_profile
from scheduler.settings import SETTINGS_KEY, LiveSettings, SchedulerSettings
from scheduler.tuning.engine_tuner import Change, EngineTuner
from scheduler.wire import UnreadableMessage

_KEPT_EVENTS = 50
_MEASURING_PERIOD_S = 0.5
_NICENESS = 5
"""The engine goes first where cores are scarce."""
logger = logging.getLogger("headrace.controller")


class OneEngineController:
    """Control cycles over the engine at `settings.channel`. events: the latest changes of thresholds, JSON-ready."""

    def __init__(self, settings: SchedulerSettings) -> None:
        assert settings.channel is not None and settings.controller is not None
        self._endpoint, self._config = settings.channel, settings.controller
        profile = load_profile(settings.first_profile).time_model if settings.first_profile else None
        self._tuning = self._config.settings(settings.targets)
        self._tuner = EngineTuner(self._tuning, profile, settings.thresholds)
        self._channel = ChannelClient(self._endpoint)
        self._cycles = 0
        self.events: deque[dict[str, Any]] = deque(maxlen=_KEPT_EVENTS)

    async def run(self) -> None:
        """Cycles until the process that started this one is gone; a failed cycle is followed by the next."""
        started_by = os.getppid()
        while os.getppid() == started_by:
            begun_s = time.monotonic()
            await self._cycle_alone()
            write_state(self._endpoint, to_json(self.state()))
            await asyncio.sleep(max(0.0, self.period_s - (time.monotonic() - begun_s)))

    @property
    def period_s(self) -> float:
        """Seconds between two cycles; short until the engine has been measured."""
        return min(self._config.period_s, _MEASURING_PERIOD_S) if self._tuner.is_measuring else self._config.period_s

    async def _cycle_alone(self) -> None:
        try:
            await self.one_cycle()
        except (ChannelClosed, UnreadableMessage) as error:  # busy with a long iteration, or still starting
            self._tuner.note = str(error)
        except Exception as error:
            note = f"not tuned: {error!r}"
            if note != self._tuner.note:  # log a repeated failure once
                logger.exception("the engine is not tuned")
            self._tuner.note = note

    async def one_cycle(self) -> None:
        """Ask for telemetry, solve for the settings that the engine says are in force, push.

        Raises:
            ChannelClosed: the engine does not answer.
        """
        telemetry: Telemetry = await self._channel.report(self._tuner.cursor)
        if telemetry.settings is not None:
            engine = LiveSettings.reported(telemetry.settings)
            self._tuner.follow(engine.tuning(self._tuning), engine.thresholds)
        proposal = self._tuner.learn(telemetry)
        push = self._tuner.next_push(telemetry, proposal, time.monotonic())
        if push.thresholds is not None:
            ack = await self._channel.apply(push.thresholds)
            change = self._tuner.answered(telemetry.thresholds, push, ack, time.monotonic())
            if change is not None:
                self._note(change)
        self._cycles += 1

    def _note(self, change: Change) -> None:
        self.events.append({
            "at_unix_s": time.time(), "old_version": change.old.version, "new_version": change.new.version,
            "accepted": change.accepted, "reason": change.reason,
        })
        logger.info("thresholds: version %d -> %d: %s", change.old.version, change.new.version, change.reason)

    def state(self) -> dict[str, Any]:
        """The estimates, the latest decision and the latest changes, JSON-ready."""
        return {
            "engine": self._tuner.shown | {"decision": self._tuner.note},
            "controller": {
                "pid": os.getpid(), "at_unix_s": time.time(), "passes": self._cycles, "period_s": self.period_s,
                "events": list(self.events),
            },
        }


def _end_with_the_engine(endpoint: str) -> None:
    """Wait for the end of standard input, remove what a killed engine core has left, and end this process."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdin.buffer.read()
    remove_endpoint(endpoint)
    os._exit(0)


def main() -> None:
    """The process: settings from standard input, then cycles until that input ends."""
    settings = SchedulerSettings.from_additional_config({SETTINGS_KEY: json.loads(sys.stdin.buffer.readline())})
    assert settings.channel is not None
    threading.Thread(target=_end_with_the_engine, args=(settings.channel,), daemon=True).start()
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(asctime)s [%(name)s] %(message)s")
    asyncio.run(OneEngineController(settings).run())


if __name__ == "__main__":
    main()
