"""The central controller: a named Ray actor that retunes every replica, every few seconds, while it serves.

Each control cycle collects telemetry, updates the model of each replica, solves the fluid model and pushes thresholds
that changed. Serving does not depend on the controller: without it replicas keep their thresholds, which lapse to the
configured ones after `validity_s`, and any ingress replica starts a new controller (`ControllerKeeper`). A new
controller rebuilds its estimates from telemetry; pins and events are in the cluster's store.

An engine reports its targets, its miss probability and its configured thresholds, and is tuned for these; the other
settings come with `configure`. So no push is ever solved for targets that the engine no longer has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.actor import ActorHandle

from cluster.event_log import Event, EventLog
from cluster.learning import Learning, Report
from cluster.measured import ControllerMeter
from cluster.outlook import Outlook
from cluster.pins import Pin, Pins
from cluster.prospects import NothingKnown, Values
from cluster.settings import ModelSettings
from cluster.tuned import TunedModel, TunedReplica
from replicas import logs
from replicas.actor_calls import ReplicaUnavailable
from replicas.cluster_store import ClusterStore
from replicas.measured import keep_telling
from replicas.questions import ask_telemetry, offer_thresholds
from replicas.ranks import EngineAddress
from replicas.served import engines_of
from replicas.store import Store
from scheduler.messages import Telemetry
from scheduler.thresholds import InvalidThresholds, thresholds_as_dict
from scheduler.tuning.engine_tuner import Change
from scheduler.tuning.replica_model import Proposal
from scheduler.tuning.slo import Slo
from scheduler.wire import UnreadableMessage

NAMESPACE = "headrace"
_IDLE_PERIOD_S = 5.0
_SHOWN_CHANGES = 20
_SILENT_PERIODS = 3.0
_TOGETHER_S = 0.25
"""Seconds in which answers are waited for, to be learned from together; later ones are learned from as they come."""
logger = logging.getLogger(__name__)


class ControlLoop:
    """Control cycles over all replicas of one application; `ControllerActor` runs it.

    models: by deployment. Each engine is tuned by itself, with its own model's settings, at that model's period.
    """

    def __init__(self, app_name: str, models: Mapping[str, TunedModel], store: Store) -> None:
        self._app_name = app_name
        self._replicas: dict[str, TunedReplica] = {}
        self.events, self._pins = EventLog(store), Pins(store)
        self.outlook = Outlook()
        self.learning = Learning(self.outlook)
        self._storing = threading.Lock()
        self.meter = ControllerMeter()
        self.passes, self._begun_unix_s = 0, 0.0
        self.configure(models)

    def configure(self, models: Mapping[str, TunedModel]) -> None:
        """Tune with these settings from the next cycle on; what is known of the replicas stays."""
        self._models = {name: model for name, model in models.items() if model.settings.controller.enabled}
        self._served = {name: model.served for name, model in self._models.items()}
        for entry in self._replicas.values():
            entry.follow(self._models.get(entry.engine.deployment, entry.tuned))
        self.hurry()

    def hurry(self) -> None:
        """Every replica is due with the next cycle."""
        for entry in self._replicas.values():
            entry.due_s = float("-inf")

    @property
    def period_s(self) -> float:
        """Seconds between two cycles: the shortest period of a model."""
        return min((one.settings.controller.period_s for one in self._models.values()), default=_IDLE_PERIOD_S)

    async def one_cycle(self) -> None:
        """Collect, solve, push. A replica without an answer, or with a failing model, does not delay the others.

        Those that answer soon are solved together in a thread, so that the actor still answers calls.
        """
        self._begun_unix_s = time.time()  # of all points of this cycle, so that they add up
        self.outlook.history.keep_only(self._begun_unix_s)
        found = await asyncio.to_thread(engines_of, self._app_name, self._served)
        self._replicas = {name: self._replicas.get(name) or self._new_replica(found[name]) for name in found}
        await self._in_store(self._look, list(found))
        self.learning.keep_only(found)
        pending = {asyncio.create_task(self._asked(name, self._replicas[name])) for name in self._due()}
        while pending:
            done, pending = await asyncio.wait(pending, timeout=_TOGETHER_S)
            if not done:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            await self._tune(dict(task.result() for task in done))
        for name, said in self.learning.news().items():
            await self._note(Event(
                at_unix_s=time.time(), kind="speed", replica=name, model=self._replicas[name].engine.model_id,
                reason=said,
            ))
        self.passes += 1

    async def _in_store(self, change: Callable[..., None], *args: Any) -> None:
        """Carry out a change of what is stored: in a thread, since it blocks, and after what was stored is read."""

        def alone() -> None:
            with self._storing:
                self.events.read()
                self._pins.read()
                change(*args)

        await asyncio.to_thread(alone)

    def _look(self, engines: Sequence[str]) -> None:
        self._pins.keep_only(engines, time.time())

    def _due(self) -> list[str]:
        """The replicas whose period has passed, but for a tenth, as cycles come a little early or late."""
        now_s, due = time.monotonic(), []
        for name, entry in self._replicas.items():
            period_s = entry.tuned.settings.controller.period_s
            if period_s <= self.period_s or now_s >= entry.due_s - 0.1 * period_s:
                entry.due_s = now_s + period_s
                due.append(name)
        return due

    def _new_replica(self, engine: EngineAddress) -> TunedReplica:
        tuned = self._models[engine.deployment]
        return TunedReplica(engine, tuned, tuned.new_tuner())

    async def _asked(self, name: str, entry: TunedReplica) -> tuple[str, Report | None]:
        """A replica's report; None: its note says why there is none."""
        try:
            with self.meter.channel(entry.engine.model_id):
                telemetry = await ask_telemetry(entry.engine, entry.tuner.cursor)
        except Exception as error:
            self._not_tuned(name, entry, error)
            return name, None
        entry.heard_s = time.monotonic()
        return name, Report(entry, telemetry)

    async def _tune(self, answers: Mapping[str, Report | None]) -> None:
        reports = {name: report for name, report in answers.items() if report is not None}
        with self.meter.solving({one.entry.engine.model_id for one in reports.values()}):
            learned = await asyncio.to_thread(self.learning.learn, reports, self._begun_unix_s, time.monotonic())
        await asyncio.gather(*(self._push(name, reports[name], found) for name, found in learned.items()))

    async def _push(self, name: str, report: Report, found: Proposal | Exception) -> None:
        try:
            if isinstance(found, Exception):
                raise found
            await self._offer(name, report, found)
        except Exception as error:
            self._not_tuned(name, report.entry, error)

    def _not_tuned(self, name: str, entry: TunedReplica, error: Exception) -> None:
        if isinstance(error, ReplicaUnavailable):
            entry.tuner.note = str(error)
            return
        readable = not isinstance(error, UnreadableMessage)  # another release, during an upgrade: thresholds stay
        note = f"not tuned: {error!r}" if readable else f"not tuned: {error}"
        if note != entry.tuner.note:  # log a repeated failure once
            logger.warning("replica %s is %s", name, note, exc_info=error if readable else None)
        entry.tuner.note = note

    async def _offer(self, name: str, report: Report, proposal: Proposal) -> None:
        entry, telemetry = report
        engine = entry.engine
        if (pin := self._pins.missing(name, engine.model_id, telemetry.thresholds)) is not None:
            await self._give(name, engine, entry, telemetry, pin)
            return
        push = entry.tuner.next_push(telemetry, proposal, time.monotonic())
        if push.thresholds is None:
            return
        ack = await offer_thresholds(engine, push.thresholds, automatic=True)
        change = entry.tuner.answered(telemetry.thresholds, push, ack, time.monotonic())
        if change is not None:
            await self._note(self._pushed(name, engine, change))

    async def _give(
        self, name: str, engine: EngineAddress, entry: TunedReplica, telemetry: Telemetry, pin: Pin
    ) -> None:
        """Offer an engine the pin of its model, which it lacks."""
        old = telemetry.thresholds
        try:
            new = pin.values(time.time()).with_version(old.version + 1)
        except InvalidThresholds as error:
            entry.tuner.note = f"the pin of {engine.model_id} cannot be given: {error}"
            return
        ack = await offer_thresholds(engine, new, automatic=False)
        if ack.accepted:
            entry.tuner.note = f"pinned by an operator at version {new.version}"
            await self._in_store(self._pins.given, name, engine.model_id)
        else:
            entry.tuner.note = f"the pin of {engine.model_id} was rejected: {ack.reason}"
        event = self._pushed(name, engine, Change(old, new, ack.accepted, entry.tuner.note))
        await self._note(replace(event, kind="pin", by=pin.by, key=pin.key))

    async def pin(self, pin: Pin, models: Sequence[str], engines: Sequence[str]) -> None:
        """Keep an operator's pin: of whole models, else of single engines."""
        await self._in_store(self._pins.pin, pin, models, engines, self._engines_of(models))
        await self._note_operator("pin", pin, models, engines)

    async def release(self, by: Pin, models: Sequence[str], engines: Sequence[str]) -> None:
        """Resume automatic tuning: of whole models, else of single engines. by: who released, when and why."""
        await self._in_store(self._pins.release, models, engines, self._engines_of(models))
        await self._note_operator("release", by, models, engines)

    async def settings_changed(self, event: Event) -> None:
        """Record a change of settings."""
        await self._note(event)

    def _engines_of(self, models: Sequence[str]) -> list[str]:
        return [name for name, entry in self._replicas.items() if entry.engine.model_id in models]

    async def _note_operator(self, kind: str, pin: Pin, models: Sequence[str], engines: Sequence[str]) -> None:
        for model, engine in [(model, "") for model in models] or [("", engine) for engine in engines]:
            await self._note(Event(
                at_unix_s=pin.at_unix_s, kind=kind, model=model, replica=engine, reason=pin.reason, by=pin.by,
                key=pin.key, new=pin.thresholds,
            ))

    async def _note(self, event: Event) -> None:
        await self._in_store(self.events.add, event)

    def _pushed(self, name: str, engine: EngineAddress, change: Change) -> Event:
        old, new = change.old, change.new
        return Event(
            at_unix_s=time.time(), replica=name, model=engine.model_id, old_version=old.version,
            new_version=new.version, accepted=change.accepted, reason=change.reason, old=thresholds_as_dict(old),
            new=thresholds_as_dict(new),
        )

    async def tell(self) -> None:
        """Record the estimates of the engines that were heard in the last few periods."""
        now_s = time.monotonic()
        self.meter.tell({
            name: (entry.engine.model_id, entry.tuner.shown) for name, entry in self._replicas.items()
            if now_s - entry.heard_s <= _SILENT_PERIODS * entry.tuned.settings.controller.period_s
        })

    def state(self) -> dict[str, Any]:
        """The estimates and the latest decision of every replica, JSON-ready."""
        return {
            "passes": self.passes,
            "period_s": self.period_s,
            "pins": self._pins.state(),
            "replicas": {name: self._entry(name, entry) for name, entry in self._replicas.items()},
        }

    async def overview(self) -> dict[str, Any]:
        """The state, with what a summary of it needs beside it; see `Outlook.added`, and the latest `changes`."""
        added = await asyncio.to_thread(self.outlook.added, dict(self._replicas), self.passes)
        state = self.state()
        for name, one in state["replicas"].items():
            one |= added["replicas"].get(name, {})
        changes = [event.brief for event in self.events[-_SHOWN_CHANGES:]]
        return state | {"prospects": added["prospects"], "changes": changes}

    def predict(self, model_id: str, values: Values) -> dict[str, Any]:
        """See `Outlook.predict`; blocking."""
        return self.outlook.predict(dict(self._replicas), model_id, values)

    def _entry(self, name: str, entry: TunedReplica) -> dict[str, Any]:
        pin = self._pins.of(name, entry.engine.model_id)
        deviation = self.learning.deviations.get(name)
        return entry.tuner.shown | {
            "decision": entry.tuner.note, "pin": pin.shown if pin else None,
            "deviation": None if deviation is None else deviation.shown,
        }


class ControllerActor:
    """The Ray actor around a `ControlLoop`."""

    def __init__(self, app_name: str, models: Mapping[str, TunedModel], log_form: dict[str, str] | None = None) -> None:
        if log_form is not None:
            logs.beside_serve("headrace_controller", log_form)
        self._loop = ControlLoop(app_name, models, ClusterStore(app_name))
        self._task: asyncio.Task[None] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._soon = asyncio.Event()
        self._started_unix_s = time.time()

    async def keep_running(self) -> bool:
        """Start the loop unless it is running; every ingress replica calls this periodically."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
            self._telling = self._telling or asyncio.create_task(keep_telling(self._loop.tell))
        return True

    async def state(self) -> dict[str, Any]:
        """See `ControlLoop.state`; `started_unix_s` differs between a controller and its successor."""
        return {"started_unix_s": self._started_unix_s} | self._loop.state()

    async def events(self) -> dict[str, Any]:
        """The latest changes of thresholds, settings and pins, at most 200, oldest first, with old and new values."""
        return {"events": self._loop.events.latest}

    async def overview(self) -> dict[str, Any]:
        """See `ControlLoop.overview`."""
        return {"started_unix_s": self._started_unix_s} | await self._loop.overview()

    async def history(self, after_unix_s: float) -> dict[str, Any]:
        """The points newer than `after_unix_s` by engine; see `cluster.history`."""
        return {"started_unix_s": self._started_unix_s, "replicas": self._loop.outlook.history.columns(after_unix_s)}

    async def predict(self, model_id: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """See `ControlLoop.predict`; `values` has the fields of `Values`. {"reason"} when nothing is known."""
        given = {**values, "targets": Slo(**values["targets"])} if values.get("targets") is not None else values
        try:
            return await asyncio.to_thread(self._loop.predict, model_id, Values(**given))
        except NothingKnown as error:
            return {"reason": str(error)}

    async def configure(self, models: Mapping[str, TunedModel]) -> bool:
        """See `ControlLoop.configure`; the next cycle begins at once."""
        self._loop.configure(models)
        self._soon.set()
        return True

    async def pin(self, pin: Mapping[str, Any], models: Sequence[str], engines: Sequence[str]) -> dict[str, Any]:
        """See `ControlLoop.pin`; `pin` has the fields of `Pin`."""
        await self._loop.pin(Pin(**pin), models, engines)
        return {"kept": True}

    async def release(self, by: Mapping[str, Any], models: Sequence[str], engines: Sequence[str]) -> dict[str, Any]:
        """See `ControlLoop.release`."""
        await self._loop.release(Pin(**by), models, engines)
        return {"kept": True}

    async def settings_changed(self, event: Mapping[str, Any]) -> bool:
        """Record a change of settings; `event` has the fields of `Event`. Engines with new ones are tuned at once."""
        await self._loop.settings_changed(Event(**event))
        self._loop.hurry()
        self._soon.set()
        return True

    async def _run(self) -> None:
        while True:
            begun = time.monotonic()
            try:
                with self._loop.meter.cycle():
                    await self._loop.one_cycle()
            except Exception:  # the next cycle starts from new telemetry
                logger.exception("a control cycle failed; the next one starts in %g s", self._loop.period_s)
            left_s = max(0.0, self._loop.period_s - (time.monotonic() - begun))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._soon.wait(), left_s)
            self._soon.clear()


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
        return max(0.5, min(periods_s, default=_IDLE_PERIOD_S) / 2)

    def with_settings(self, settings: Mapping[str, Mapping[str, Any]]) -> ControllerKeeper:
        """The same, with the settings of the models by name, as `cluster.live.live_settings` writes them."""
        return ControllerKeeper({
            name: replace(one, settings=ModelSettings.model_validate(settings[one.served.model_id]))
            if one.served.model_id in settings else one
            for name, one in self.models.items()
        })

    def ensure(self, app_name: str) -> ActorHandle:
        """The controller of an application, started if there is none.

        The ingress replica that starts it owns it, so the controller ends with the application.
        """
        remote = ray.remote(ControllerActor)
        actor = remote.options(
            name=controller_name(app_name), namespace=NAMESPACE, get_if_exists=True, num_cpus=0, max_restarts=-1
        ).remote(app_name, self.models, logs.form())
        actor.keep_running.remote()
        return actor


def controller_name(app_name: str) -> str:
    """The actor name of an application's controller, in the namespace `NAMESPACE`."""
    return f"controller:{app_name}"
