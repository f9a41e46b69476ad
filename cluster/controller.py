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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from cluster.settings import ModelSettings
from replicas.actor_calls import ReplicaUnavailable
from replicas.questions import ask_telemetry, offer_thresholds
from replicas.ranks import EngineAddress, ServedModel
from replicas.served import engines_of
from scheduler.messages import Telemetry
from scheduler.model.fluid import finite_or_none
from scheduler.model.profiles import load_profile
from scheduler.thresholds import Thresholds, thresholds_as_dict
from scheduler.tuning.next_push import next_push
from scheduler.tuning.replica_model import Proposal, ReplicaModel
from scheduler.wire import UnreadableMessage

NAMESPACE = "headrace"
_KEPT_EVENTS = 200
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TunedModel:
    """A model of the application, and the settings with which its replicas are tuned."""

    served: ServedModel
    settings: ModelSettings

    def new_replica_model(self) -> ReplicaModel:
        """What is known of a replica before it has reported anything."""
        time_model = load_profile(self.settings.controller.profile).time_model
        return ReplicaModel(self.settings.tuning(), time_model, self.settings.thresholds)


@dataclass(slots=True)
class _Replica:
    """One engine: what it serves, its model of the replica, `cursor` (records read so far), `shown`, its entry in
    `state`, and when it is due (monotonic seconds)."""

    tuned: TunedModel
    model: ReplicaModel
    cursor: int = 0
    shown: dict[str, Any] = field(default_factory=dict)
    pushed_at_s: float = 0.0
    due_s: float = float("-inf")
    note: str = ""

    def learn(self, telemetry: Telemetry) -> Proposal:
        """Update the model from a report and solve; blocking, so not on an event loop. A model that raises on a report
        is replaced by a new one, which continues after that report, so bad records are not read twice."""
        try:
            self.model.observe(telemetry)
        except Exception:
            self.model = self.tuned.new_replica_model()
            raise
        finally:
            self.cursor = telemetry.cursor
        proposal = self.model.propose()
        self.shown = _shown(self.tuned, self.model, proposal)
        return proposal


@dataclass(frozen=True, slots=True)
class Event:
    """One change of thresholds: time (Unix seconds), engine, model, versions, reason, and whether it was accepted."""

    at_unix_s: float
    replica: str
    model: str
    old_version: int
    new_version: int
    accepted: bool
    reason: str
    old: dict[str, Any] = field(default_factory=dict)
    new: dict[str, Any] = field(default_factory=dict)


class ControlLoop:
    """Control cycles over all replicas of one application; `ControllerActor` runs it.

    models: by deployment. Each engine is tuned by itself, with its own model's settings, at that model's period.
    """

    def __init__(self, app_name: str, models: Mapping[str, TunedModel]) -> None:
        self._app_name = app_name
        self._models = {name: model for name, model in models.items() if model.settings.controller.enabled}
        self._served = {name: model.served for name, model in self._models.items()}
        self._replicas: dict[str, _Replica] = {}
        self.events: deque[Event] = deque(maxlen=_KEPT_EVENTS)
        self.passes = 0

    @property
    def period_s(self) -> float:
        """Seconds between two cycles: the shortest period of a model."""
        return min(model.settings.controller.period_s for model in self._models.values())

    async def one_cycle(self) -> None:
        """Collect, solve, push. A replica without an answer, or with a failing model, does not delay the others.

        Replicas are solved one after the other in a thread, so that the actor still answers calls.
        """
        found = await asyncio.to_thread(engines_of, self._app_name, self._served)
        self._replicas = {name: self._replicas.get(name) or self._new_replica(found[name]) for name in found}
        solving = asyncio.Lock()
        await asyncio.gather(
            *(self._tune_alone(name, found[name], self._replicas[name], solving) for name in self._due())
        )
        self.passes += 1

    def _due(self) -> list[str]:
        """The replicas whose period has passed, but for a tenth, as cycles come a little early or late."""
        now_s, due = time.monotonic(), []
        for name, entry in self._replicas.items():
            period_s = entry.tuned.settings.controller.period_s
            if period_s <= self.period_s or now_s >= entry.due_s - 0.1 * period_s:
                entry.due_s = now_s + period_s
                due.append(name)
        return due

    def _new_replica(self, engine: EngineAddress) -> _Replica:
        tuned = self._models[engine.deployment]
        model = tuned.new_replica_model()
        return _Replica(tuned, model, shown=_shown(tuned, model, None))

    async def _tune_alone(self, name: str, engine: EngineAddress, entry: _Replica, solving: asyncio.Lock) -> None:
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

    async def _tune(self, name: str, engine: EngineAddress, entry: _Replica, solving: asyncio.Lock) -> None:
        telemetry = await ask_telemetry(engine, entry.cursor)
        async with solving:
            proposal = await asyncio.to_thread(entry.learn, telemetry)
        push = next_push(
            telemetry, proposal, pushed_s_ago=time.monotonic() - entry.pushed_at_s,
            validity_s=entry.tuned.settings.controller.validity_s,
        )
        if push.thresholds is None:
            entry.note = push.reason
        else:
            await self._push(name, engine, entry, telemetry.thresholds, push.thresholds, push.changed)

    async def _push(
        self, name: str, engine: EngineAddress, entry: _Replica, old: Thresholds, new: Thresholds, changed: bool
    ) -> None:
        ack = await offer_thresholds(engine, new, automatic=True)
        entry.note = new.reason if ack.accepted else f"rejected: {ack.reason}"
        if ack.accepted:
            entry.pushed_at_s = time.monotonic()
        if changed or not ack.accepted:
            event = Event(
                at_unix_s=time.time(), replica=name, model=engine.model_id, old_version=old.version,
                new_version=new.version, accepted=ack.accepted, reason=entry.note, old=thresholds_as_dict(old),
                new=thresholds_as_dict(new),
            )
            self.events.append(event)
            logger.info("thresholds of %s: version %d -> %d: %s", name, old.version, new.version, entry.note)

    def state(self) -> dict[str, Any]:
        """The estimates and the latest decision of every replica, JSON-ready."""
        return {
            "passes": self.passes,
            "period_s": self.period_s,
            "replicas": {name: entry.shown | {"decision": entry.note} for name, entry in self._replicas.items()},
        }


def _shown(tuned: TunedModel, model: ReplicaModel, proposal: Proposal | None) -> dict[str, Any]:
    time_model = model.time_model
    equilibrium = proposal.equilibrium if proposal else None
    forecast = proposal.forecast if proposal else None
    fluid = None
    if equilibrium is not None:
        fluid = {
            "load": equilibrium.load,
            "iteration_time_s": finite_or_none(equilibrium.iteration_time_s),
            "memory_tokens": finite_or_none(equilibrium.memory_tokens),
            "kv_capacity_tokens": equilibrium.kv_capacity_tokens,
            "stable": equilibrium.stable,
            "fits_memory": equilibrium.fits_memory,
            "critical_rate_scale": finite_or_none(equilibrium.critical_rate_scale),
            "limit": equilibrium.limit,
        }
    return {
        "targets": asdict(tuned.settings.targets),
        "rate_rps": model.rate_rps,
        "finished_seen": model.finished_seen,
        "time_model": asdict(time_model.time_model)
        | {"r2": time_model.r2, "mape": time_model.mape, "records": time_model.records},
        "fluid": fluid,
        "forecast": forecast.as_dict() if forecast else None,
    }


class ControllerActor:
    """The Ray actor around a `ControlLoop`."""

    def __init__(self, app_name: str, models: Mapping[str, TunedModel]) -> None:
        self._loop = ControlLoop(app_name, models)
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
                logger.exception("a control cycle failed; the next one starts in %g s", self._loop.period_s)
            await asyncio.sleep(max(0.0, self._loop.period_s - (time.monotonic() - begun)))


@dataclass(frozen=True, slots=True)
class ControllerKeeper:
    """Starts the controller from an ingress replica unless it exists; safe to run in several replicas at once.

    models: by deployment; at least one has its controller enabled.
    """

    models: Mapping[str, TunedModel]

    @property
    def check_every_s(self) -> float:
        """Seconds between two checks: a lost controller is replaced within two of its periods."""
        periods_s = [
            model.settings.controller.period_s for model in self.models.values() if model.settings.controller.enabled
        ]
        return max(0.5, min(periods_s) / 2)

    def ensure(self, app_name: str) -> ActorHandle:
        """The controller of an application, started if there is none.

        The ingress replica that starts it owns it, so the controller ends with the application.
        """
        remote = ray.remote(ControllerActor)
        actor = remote.options(
            name=controller_name(app_name), namespace=NAMESPACE, get_if_exists=True, num_cpus=0, max_restarts=-1
        ).remote(app_name, self.models)
        actor.keep_running.remote()
        return actor


def controller_name(app_name: str) -> str:
    """The actor name of an application's controller, in the namespace `NAMESPACE`."""
    return f"controller:{app_name}"
