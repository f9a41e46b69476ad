"""The central controller: a named Ray actor that retunes every replica, every few seconds, while it serves.

Replicas report by themselves (`replicas.reports`). Each control cycle takes what has come, updates what is known of
each replica, solves the fluid model and pushes thresholds that changed. Serving does not depend on the controller:
without it replicas keep their thresholds, which lapse to the configured ones after `validity_s`, and any ingress
replica starts a new controller (`cluster.keeper`). A new
controller rebuilds its estimates from telemetry; pins and events are in the cluster's store.

An engine reports its targets, its miss probability and its configured thresholds, and is tuned for these; the other
settings come with `configure`. So no push is ever solved for targets that the engine no longer has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from cluster.event_log import Event, EventLog, together
from cluster.inbox import NOT_TUNED, Inbox, digesting, next_report_s
from cluster.learning import Learned, Learning
from cluster.measured import ControllerMeter
from cluster.offers import Changed, Lacking, PinOffers, changed_by
from cluster.outlook import Outlook
from cluster.pins import Pin, Pins
from cluster.prospects import NothingKnown, Values
from cluster.scaling import Scaling
from cluster.tuned import TunedModel, TunedReplica
from replicas import logs
from replicas.actor_calls import ReplicaUnavailable
from replicas.cluster_store import ClusterStore
from replicas.measured import keep_telling
from replicas.questions import offer_thresholds
from replicas.ranks import EngineAddress
from replicas.served import engines_of
from replicas.store import Store
from scheduler.estimation.pool import SILENT_PASSES, Deviation
from scheduler.tuning.slo import Slo
from scheduler.wire import UnreadableMessage

IDLE_PERIOD_S = 5.0
"""Seconds between two passes while no model is tuned."""
_SHOWN_CHANGES = 20
_TOGETHER_S = 0.2
"""Seconds in which more urgent reports are waited for, to be learned from together."""
logger = logging.getLogger(__name__)


class ControlLoop:
    """Control cycles over all replicas of one application; `ControllerActor` runs it.

    models: by deployment. Each engine is tuned by itself, with its own model's settings, at that model's period.
    """

    def __init__(self, app_name: str, models: Mapping[str, TunedModel], store: Store) -> None:
        self._app_name = app_name
        self._replicas: dict[str, TunedReplica] = {}
        self._untuned: dict[str, EngineAddress] = {}
        self.events, self._pins = EventLog(store), Pins(store)
        self._pin_offers = PinOffers(self._pins, self._in_store)
        self.outlook, self.scaling = Outlook(), Scaling(store)
        self.learning = Learning(self.outlook)
        self.inbox = Inbox()
        self.next_pass_s = float("-inf")  # when the next pass begins, monotonic
        self._storing = threading.Lock()
        self.meter = ControllerMeter()
        self.passes, self._begun_unix_s = 0, 0.0
        self.configure(models)

    def configure(self, models: Mapping[str, TunedModel]) -> None:
        """Tune with these settings from the next cycle on; what is known of the replicas stays. Models whose tuning is
        off have their pins all the same."""
        self._models = {name: model for name, model in models.items() if model.settings.controller.enabled}
        self._digesting = {name: digesting(model) for name, model in self._models.items()}
        self._served = {name: model.served for name, model in models.items()}
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
        return min((one.settings.controller.period_s for one in self._models.values()), default=IDLE_PERIOD_S)

    async def one_cycle(self) -> None:
        """Read what has been reported, solve, push. A silent replica, or one with a failing model, delays no other.

        All are read and solved together in a thread, so that the actor still answers calls.
        """
        self._begun_unix_s = time.time()  # of all points of this cycle, so that they add up
        self.outlook.history.keep_only(self._begun_unix_s)
        found = await asyncio.to_thread(engines_of, self._app_name, self._served)
        tuned = {name: engine for name, engine in found.items() if engine.deployment in self._models}
        self._replicas = {name: self._replicas.get(name) or self._new_replica(engine) for name, engine in tuned.items()}
        self._untuned = {name: engine for name, engine in found.items() if name not in tuned}
        await self._in_store(self._look, list(found))
        self.learning.keep_only(tuned)
        self.inbox.keep_only(found, time.monotonic())
        due = self._due()
        reports = self.inbox.fresh(due)
        for name in reports:
            entry = self._replicas[name]
            entry.due_s = time.monotonic() + entry.tuned.settings.controller.period_s
        self._note_silent(due - reports.keys())
        with self.meter.solving({self._replicas[name].engine.model_id for name in reports}):
            learned = await asyncio.to_thread(
                self.learning.learn, {name: (self._replicas[name], report) for name, report in reports.items()},
                self._begun_unix_s, time.monotonic(),
            )
        changes = await asyncio.gather(*(self._push(name, self._replicas[name], one) for name, one in learned.items()))
        given = await self._pin_offers.give_untuned(self._untuned, self.inbox.fresh(self._untuned), time.time())
        await self._note(*together([one for one in (*changes, *given) if one is not None]))
        await self._note(*(
            Event(
                at_unix_s=time.time(), kind="speed", replica=name, model=self._replicas[name].engine.model_id,
                reason=said,
            ) for name, said in self.learning.news().items()
        ))
        answered = [name for name, one in learned.items() if not isinstance(one, Exception)]
        await asyncio.to_thread(
            self.scaling.look, time.monotonic(), self._begun_unix_s, self._models, dict(self._replicas), answered
        )
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

    def _due(self) -> set[str]:
        """The replicas whose period has passed, but for a tenth, as cycles come a little early or late."""
        now_s, due = time.monotonic(), set()
        for name, entry in self._replicas.items():
            period_s = entry.tuned.settings.controller.period_s
            if period_s <= self.period_s or now_s >= entry.due_s - 0.1 * period_s:
                due.add(name)
        return due

    def report(self, deployment: str, reports: Mapping[str, bytes], *, urgent: bool = False) -> dict[str, Any]:
        """Take the reports of a replica's engines, by name, and say how to report next: in `next_s` seconds, with what
        `digesting` says; `cursors`: the records that are known, for engines whose policy needs records. urgent: these
        engines are due with the next cycle."""
        now_s, model = time.monotonic(), self._models.get(deployment)
        if deployment in self._served:  # a pin may be missing where nothing is tuned
            self.inbox.take(reports, now_s)
        if model is None:
            return dict(NOT_TUNED)
        known = {name: one for name in reports if (one := self._replicas.get(name)) is not None}
        for one in known.values() if urgent else ():
            one.due_s = float("-inf")
        cursors = {name: one.tuner.cursor for name, one in known.items()}
        next_s = next_report_s(
            next(iter(reports), ""), model.settings.controller.period_s, len(self._replicas), self.next_pass_s - now_s
        )
        return self._digesting[deployment] | {"next_s": next_s, "cursors": cursors}

    def _note_silent(self, names: Collection[str]) -> None:
        now_s = time.monotonic()
        for name in names:
            entry = self._replicas[name]
            for_s = now_s - self.inbox.heard_s(name)
            if for_s == math.inf:
                entry.tuner.note = "no report yet: the replica is starting"
            elif for_s > SILENT_PASSES * entry.tuned.settings.controller.period_s:
                entry.tuner.note = f"no report for {for_s:.0f} s: the replica is busy, cut off or gone"

    def _new_replica(self, engine: EngineAddress) -> TunedReplica:
        tuned = self._models[engine.deployment]
        return TunedReplica(engine, tuned, tuned.new_tuner())

    async def _push(self, name: str, entry: TunedReplica, learned: Learned | Exception) -> Changed | None:
        """Send a replica what was learned for it; the change to be noted."""
        try:
            if isinstance(learned, Exception):
                raise learned
            return await self._offer(name, entry, learned)
        except Exception as error:
            self._not_tuned(name, entry, error)
            return None

    def _not_tuned(self, name: str, entry: TunedReplica, error: Exception) -> None:
        if isinstance(error, ReplicaUnavailable):
            entry.tuner.note = str(error)
            return
        readable = not isinstance(error, UnreadableMessage)  # another release, during an upgrade: thresholds stay
        note = f"not tuned: {error!r}" if readable else f"not tuned: {error}"
        if note != entry.tuner.note:  # log a repeated failure once
            logger.warning("replica %s is %s", name, note, exc_info=error if readable else None)
        entry.tuner.note = note

    async def _offer(self, name: str, entry: TunedReplica, learned: Learned) -> Changed | None:
        engine, telemetry, push = entry.engine, learned.telemetry, learned.push
        if (pin := self._pins.missing(name, engine.model_id, telemetry.thresholds)) is not None:
            lacking = Lacking(pin, telemetry.thresholds)
            entry.tuner.note, changed = await self._pin_offers.give(name, engine, lacking, time.time())
            return changed
        if push.thresholds is None:
            return None
        with self.meter.channel(engine.model_id):
            ack = await offer_thresholds(engine, push.thresholds, automatic=True)
        change = entry.tuner.answered(telemetry.thresholds, push, ack, time.monotonic())
        return None if change is None else changed_by(name, engine, change, time.time())

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
        engines = {name: entry.engine for name, entry in self._replicas.items()} | self._untuned
        return [name for name, engine in engines.items() if engine.model_id in models]

    async def _note_operator(self, kind: str, pin: Pin, models: Sequence[str], engines: Sequence[str]) -> None:
        for model, engine in [(model, "") for model in models] or [("", engine) for engine in engines]:
            await self._note(Event(
                at_unix_s=pin.at_unix_s, kind=kind, model=model, replica=engine, reason=pin.reason, by=pin.by,
                key=pin.key, new=pin.thresholds,
            ))

    async def _note(self, *events: Event) -> None:
        if events:
            await self._in_store(self.events.add_all, events)

    async def tell(self) -> None:
        """Record the estimates of the engines that were heard in the last few periods."""
        now_s = time.monotonic()
        self.meter.tell({
            name: (entry.engine.model_id, entry.tuner.shown) for name, entry in self._replicas.items()
            if now_s - self.inbox.heard_s(name) <= SILENT_PASSES * entry.tuned.settings.controller.period_s
        }, self.scaling.wanted)

    def state(self) -> dict[str, Any]:
        """The estimates and the latest decision of every replica, JSON-ready."""
        apart = self.learning.deviations
        return {
            "passes": self.passes,
            "period_s": self.period_s,
            "pins": self._pins.state(),
            "scaling": self.scaling.shown(),
            "replicas": {name: self._entry(name, one, apart.get(name)) for name, one in self._replicas.items()},
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

    def _entry(self, name: str, entry: TunedReplica, deviation: Deviation | None) -> dict[str, Any]:
        pin = self._pins.of(name, entry.engine.model_id)
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

    async def keep_running(self) -> float:
        """Start the loop unless it is running; every ingress replica calls this periodically. Returns since when this
        controller exists, Unix seconds: another value means that it has to be told the settings again."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
            self._telling = self._telling or asyncio.create_task(keep_telling(self._loop.tell))
        return self._started_unix_s

    async def report(self, deployment: str, reports: Mapping[str, bytes], urgent: bool) -> dict[str, Any]:
        """See `ControlLoop.report`; after an urgent one, a pass begins at once."""
        answer = self._loop.report(deployment, reports, urgent=urgent)
        if urgent:
            self._soon.set()
        return answer

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
            self._loop.next_pass_s = begun + self._loop.period_s
            try:
                with self._loop.meter.cycle():
                    await self._loop.one_cycle()
            except Exception:  # the next cycle starts from new telemetry
                logger.exception("a control cycle failed; the next one starts in %g s", self._loop.period_s)
            left_s = max(0.0, self._loop.period_s - (time.monotonic() - begun))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._soon.wait(), left_s)
                await asyncio.sleep(_TOGETHER_S)
            self._soon.clear()
