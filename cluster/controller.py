"""The central controller: a named Ray actor that retunes every replica, every few seconds, while it serves.

Each control cycle collects telemetry, updates the model of each replica, solves the fluid model and pushes thresholds
that changed. Serving does not depend on the controller: without it replicas keep their thresholds, which lapse to the
configured ones after `validity_s`, and any ingress replica starts a new controller (`ControllerKeeper`). A new
controller rebuilds all its state from telemetry.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from cluster.config import ControllerConfig
from replicas.actor_calls import ReplicaUnavailable, replica_ids
from replicas.questions import ask_telemetry, offer_thresholds
from replicas.ranks import EngineAddress, engine_addresses
from scheduler.model.profiles import load_profile
from scheduler.thresholds import Thresholds, thresholds_as_dict
from scheduler.tuning.engine_tuner import Change, EngineTuner
from scheduler.tuning.slo import Slo
from scheduler.wire import UnreadableMessage

NAMESPACE = "headrace"
_KEPT_EVENTS = 200
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Event:
    """One change of thresholds: time (Unix seconds), engine, versions, reason, and whether it was accepted."""

    at_unix_s: float
    replica: str
    old_version: int
    new_version: int
    accepted: bool
    reason: str
    old: dict[str, Any] = field(default_factory=dict)
    new: dict[str, Any] = field(default_factory=dict)


class ControlLoop:
    """Control cycles over all replicas of one application; `ControllerActor` runs it.

    ranks: engines per replica (data parallel). Each engine is tuned separately.
    """

    def __init__(
        self, app_name: str, config: ControllerConfig, targets: Slo, configured: Thresholds, ranks: int = 1
    ) -> None:
        self._app_name, self._config, self._configured, self._ranks = app_name, config, configured, ranks
        self._settings = config.settings(targets)
        self._profile = load_profile(config.profile)
        self._replicas: dict[str, EngineTuner] = {}
        self.events: deque[Event] = deque(maxlen=_KEPT_EVENTS)
        self.passes = 0

    async def one_cycle(self) -> None:
        """Collect, solve, push. A replica without an answer, or with a failing model, does not delay the others.

        Replicas are solved one after the other in a thread, so that the actor still answers calls.
        """
        found = engine_addresses(await asyncio.to_thread(replica_ids, self._app_name), self._ranks)
        self._replicas = {name: self._replicas.get(name) or self._new_tuner() for name in found}
        solving = asyncio.Lock()
        await asyncio.gather(
            *(self._tune_alone(name, found[name], entry, solving) for name, entry in self._replicas.items())
        )
        self.passes += 1

    def _new_tuner(self) -> EngineTuner:
        return EngineTuner(self._settings, self._profile.time_model, self._configured)

    async def _tune_alone(self, name: str, engine: EngineAddress, entry: EngineTuner, solving: asyncio.Lock) -> None:
        try:
            await self._tune(name, engine, entry, solving)
        except ReplicaUnavailable as error:
            entry.note = str(error)
        except UnreadableMessage as error:  # another release, during an upgrade: the replica keeps its thresholds
            note = f"not tuned: {error}"
            if note != entry.note:
                logger.warning("replica %s is %s", name, note)
            entry.note = note
        except Exception as error:
            note = f"not tuned: {error!r}"
            if note != entry.note:  # log a repeated failure once
                logger.exception("replica %s is not tuned", name)
            entry.note = note

    async def _tune(self, name: str, engine: EngineAddress, entry: EngineTuner, solving: asyncio.Lock) -> None:
        telemetry = await ask_telemetry(engine, entry.cursor)
        async with solving:
            proposal = await asyncio.to_thread(entry.learn, telemetry)
        push = entry.next_push(telemetry, proposal, time.monotonic())
        if push.thresholds is None:
            return
        ack = await offer_thresholds(engine, push.thresholds, automatic=True)
        change = entry.answered(telemetry.thresholds, push, ack, time.monotonic())
        if change is not None:
            self._note(name, change)

    def _note(self, name: str, change: Change) -> None:
        old, new = change.old, change.new
        event = Event(
            at_unix_s=time.time(), replica=name, old_version=old.version, new_version=new.version,
            accepted=change.accepted, reason=change.reason, old=thresholds_as_dict(old), new=thresholds_as_dict(new),
        )
        self.events.append(event)
        logger.info("thresholds of %s: version %d -> %d: %s", name, old.version, new.version, change.reason)

    def state(self) -> dict[str, Any]:
        """The estimates and the latest decision of every replica, JSON-ready."""
        return {
            "passes": self.passes,
            "period_s": self._config.period_s,
            "replicas": {name: entry.shown | {"decision": entry.note} for name, entry in self._replicas.items()},
        }


class ControllerActor:
    """The Ray actor around a `ControlLoop`."""

    def __init__(
        self, app_name: str, config: ControllerConfig, targets: Slo, configured: Thresholds, ranks: int = 1
    ) -> None:
        self._loop = ControlLoop(app_name, config, targets, configured, ranks)
        self._config = config
        self._task: asyncio.Task[None] | None = None
        self._started_unix_s = time.time()

    async def keep_running(self) -> bool:
        """Start the loop unless it is running; every ingress replica calls this periodically."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return True

    async def state(self) -> dict[str, Any]:
        """See `ControlLoop.state`; `started_unix_s` differs between a controller and its successor."""
        return {"started_unix_s": self._started_unix_s} | self._loop.state()

    async def events(self) -> dict[str, Any]:
        """The latest changes of thresholds, at most 200, oldest first, with the old and the new values."""
        return {"events": [asdict(event) for event in self._loop.events]}

    async def _run(self) -> None:
        while True:
            begun = time.monotonic()
            try:
                await self._loop.one_cycle()
            except Exception:  # the next cycle starts from new telemetry
                logger.exception("a control cycle failed; the next one starts in %g s", self._config.period_s)
            await asyncio.sleep(max(0.0, self._config.period_s - (time.monotonic() - begun)))


@dataclass(frozen=True, slots=True)
class ControllerKeeper:
    """Starts the controller from an ingress replica unless it exists; safe to run in several replicas at once."""

    config: ControllerConfig
    targets: Slo
    configured: Thresholds
    ranks: int = 1

    @property
    def check_every_s(self) -> float:
        """Seconds between two checks: a lost controller is replaced within two of its periods."""
        return max(0.5, self.config.period_s / 2)

    def ensure(self, app_name: str) -> ActorHandle:
        """The controller of an application, started if there is none.

        The ingress replica that starts it owns it, so the controller ends with the application.
        """
        remote = ray.remote(ControllerActor)
        actor = remote.options(
            name=controller_name(app_name), namespace=NAMESPACE, get_if_exists=True, num_cpus=0, max_restarts=-1
        ).remote(app_name, self.config, self.targets, self.configured, self.ranks)
        actor.keep_running.remote()
        return actor


def controller_name(app_name: str) -> str:
    """The actor name of an application's controller, in the namespace `NAMESPACE`."""
    return f"controller:{app_name}"
