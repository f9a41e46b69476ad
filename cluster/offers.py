"""What is offered to engines and becomes an event: pins above all, also to engines of models whose tuning is off."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from cluster.event_log import Event
from cluster.pins import Pin, Pins
from replicas.questions import offer_thresholds, read_from
from replicas.ranks import EngineAddress
from scheduler.messages import Telemetry
from scheduler.thresholds import InvalidThresholds, Thresholds
from scheduler.tuning.engine_tuner import Change

Changed = tuple[Event, Thresholds, Thresholds]
"""An event, with the thresholds before and after it."""
logger = logging.getLogger(__name__)


class Lacking(NamedTuple):
    """The pin that an engine lacks, and the thresholds that it has instead."""

    pin: Pin
    active: Thresholds


def changed_by(name: str, engine: EngineAddress, change: Change, at_unix_s: float) -> Changed:
    """The event of an answered offer."""
    old, new = change.old, change.new
    event = Event(
        at_unix_s=at_unix_s, replica=name, model=engine.model_id, old_version=old.version, new_version=new.version,
        accepted=change.accepted, reason=change.reason,
    )
    return event, old, new


class PinOffers:
    """Gives engines the pins that they lack. in_store: carries out a change of the pins where they are stored."""

    def __init__(self, pins: Pins, in_store: Callable[..., Awaitable[None]]) -> None:
        self._pins, self._in_store = pins, in_store

    async def give(
        self, name: str, engine: EngineAddress, lacking: Lacking, at_unix_s: float
    ) -> tuple[str, Changed | None]:
        """What came of it, in words, and the change to be noted, unless the pin cannot be offered."""
        pin, old = lacking
        try:
            new = pin.values(at_unix_s).with_version(old.version + 1)
        except InvalidThresholds as error:
            return f"the pin of {engine.model_id} cannot be given: {error}", None
        ack = await offer_thresholds(engine, new, automatic=False)
        if ack.accepted:
            note = f"pinned by an operator at version {new.version}"
            await self._in_store(self._pins.given, name, engine.model_id)
        else:
            note = f"the pin of {engine.model_id} was rejected: {ack.reason}"
        event, *_ = changed_by(name, engine, Change(old, new, ack.accepted, note), at_unix_s)
        return note, (replace(event, kind="pin", by=pin.by, key=pin.key), old, new)

    async def give_untuned(
        self, engines: Mapping[str, EngineAddress], reports: Mapping[str, bytes], at_unix_s: float
    ) -> list[Changed]:
        """Give engines whose tuning is off what they lack by their reports; one that fails delays no other."""
        lacking = await asyncio.to_thread(self._lacking, engines, reports)
        given: list[Any] = await asyncio.gather(
            *(self.give(name, engines[name], one, at_unix_s) for name, one in lacking.items()), return_exceptions=True
        )
        for name, one in zip(lacking, given, strict=True):
            if isinstance(one, BaseException) or one[1] is None:
                logger.warning("replica %s has not got the pin of its model: %s", name, one)
        return [one[1] for one in given if not isinstance(one, BaseException) and one[1] is not None]

    def _lacking(self, engines: Mapping[str, EngineAddress], reports: Mapping[str, bytes]) -> dict[str, Lacking]:
        """Reports are read for nothing else, so only where a pin holds."""
        found: dict[str, Lacking] = {}
        for name, report in reports.items():
            engine = engines[name]
            if self._pins.of(name, engine.model_id) is None:
                continue
            try:
                active = read_from(engine, report, Telemetry).thresholds
            except Exception as error:  # it is starting, or of another release
                logger.info("whether replica %s has the pin of its model is not known: %s", name, error)
                continue
            if (pin := self._pins.missing(name, engine.model_id, active)) is not None:
                found[name] = Lacking(pin, active)
        return found
