"""Pins: thresholds that an operator wants kept, for all replicas of a model or for one engine.

A pin of a model is for its deployment: every new replica gets it. A pin, or a release, of one engine goes with that
engine. Kept in the cluster, so that a new controller knows them. No clock, no messages.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from replicas.store import Store
from scheduler.thresholds import Thresholds, parse_thresholds

_KEY = "pins"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """thresholds: the values, as JSON; by, key, at_unix_s, reason: who, with which key, when and why.

    until_unix_s: end of the thresholds' own validity (None: until it is released). given_to: the engines that have it.
    """

    thresholds: dict[str, Any]
    by: str = ""
    key: str = ""
    at_unix_s: float = 0.0
    reason: str = ""
    until_unix_s: float | None = None
    given_to: tuple[str, ...] = ()

    def values(self, now_s: float) -> Thresholds:
        """The thresholds to offer now, under the version that follows the active one.

        Raises:
            InvalidThresholds: they are of another release.
        """
        left_s = None if self.until_unix_s is None else max(self.until_unix_s - now_s, 1e-3)
        return replace(parse_thresholds(self.thresholds), version=0, pinned=True, valid_for_s=left_s)

    @property
    def shown(self) -> dict[str, Any]:
        """Who, when and why, JSON-ready."""
        return {name: getattr(self, name) for name in ("by", "key", "at_unix_s", "reason", "until_unix_s")}


@dataclass(frozen=True, slots=True)
class _Kept:
    """by model: its pin; by engine: its own pin, or None where it alone was released."""

    models: dict[str, Pin]
    engines: dict[str, Pin | None]


_KEPT: TypeAdapter[_Kept] = TypeAdapter(_Kept)


class Pins:
    """The pins of one application. `read` and whatever changes them block on the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept = _Kept({}, {})
        self._read = False

    def read(self) -> None:
        """Take over what is stored; later calls do nothing."""
        if self._read:
            return
        stored = self._store.get(_KEY)
        self._read = True
        if stored is None:
            return
        try:
            self._kept = _KEPT.validate_python(stored, extra="ignore")
        except ValidationError as error:
            logger.error("the stored pins are of another release and are dropped: %s", error)

    def pin(
        self, pin: Pin, models: Iterable[str] = (), engines: Iterable[str] = (), instead_of: Iterable[str] = ()
    ) -> None:
        """Keep a pin, of whole models or of single engines; drop what was kept of the engines `instead_of`."""
        self._change(dict.fromkeys(models, pin), dict.fromkeys(engines, pin), instead_of)

    def release(
        self, models: Iterable[str] = (), engines: Iterable[str] = (), instead_of: Iterable[str] = ()
    ) -> None:
        """Release whole models, or single engines whatever their model's pin says; `instead_of` as in `pin`."""
        for model in models:
            self._kept.models.pop(model, None)
        self._change({}, dict.fromkeys(engines), instead_of)

    def keep_only(self, engines: Collection[str], now_s: float) -> None:
        """Drop the pins of engines that are gone, and pins whose time is over."""
        over = [name for name, pin in self._kept.models.items() if _is_over(pin, now_s)]
        gone = [name for name, pin in self._kept.engines.items() if name not in engines or _is_over(pin, now_s)]
        for name in over:
            del self._kept.models[name]
        if over or gone:
            self._change({}, {}, gone)

    def missing(self, engine: str, model: str, active: Thresholds) -> Pin | None:
        """The pin of its model that this engine lacks; None when it has what it should have."""
        pin = self._kept.models.get(model)
        if pin is None or engine in self._kept.engines or (active.pinned and engine in pin.given_to):
            return None
        return pin

    def given(self, engine: str, model: str) -> None:
        """The engine has its model's pin now."""
        pin = self._kept.models.get(model)
        if pin is not None and engine not in pin.given_to:
            self._change({model: replace(pin, given_to=(*pin.given_to, engine))}, {})

    def of(self, engine: str, model: str) -> Pin | None:
        """The pin that holds for an engine."""
        return self._kept.engines[engine] if engine in self._kept.engines else self._kept.models.get(model)

    def state(self) -> dict[str, dict[str, Any]]:
        """The pins of whole models, JSON-ready."""
        return {model: pin.shown for model, pin in self._kept.models.items()}

    def _change(
        self, models: dict[str, Pin], engines: dict[str, Pin] | dict[str, Pin | None], forgotten: Iterable[str] = ()
    ) -> None:
        for engine in forgotten:
            self._kept.engines.pop(engine, None)
        self._kept.models.update(models)
        self._kept.engines.update(engines)
        self._store.put(_KEY, asdict(self._kept))


def _is_over(pin: Pin | None, now_s: float) -> bool:
    return pin is not None and pin.until_unix_s is not None and now_s >= pin.until_unix_s

