"""The latest changes of thresholds, settings and pins: kept in the cluster, one log line each."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from replicas.store import Store
from scheduler.thresholds import Thresholds, thresholds_as_dict

KEPT_EVENTS = 200
_FOLDER = "events/"
_MOST_CHANGES, _ALIKE = 12, 8
_CURVES = frozenset({"survival", "time_model"})
_GROUPS = frozenset({"types", "segments"})
_SAID_ELSEWHERE = frozenset({"version", "reason", "valid_for_s"})
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One change. kind: thresholds (a push of the controller), settings, pin, release, or speed (a replica has become
    slower or faster than its siblings, or is no more).

    at_unix_s: when; model, replica: what it is about (empty: all of them); old_version, new_version: of thresholds
    (None: does not apply); accepted: whether it took effect; reason: why; by: an operator's name for itself; key: with
    which key ("operator key", "anonymous"; empty: not an operator's change); old, new: the values.
    """

    at_unix_s: float
    kind: str = "thresholds"
    replica: str = ""
    model: str = ""
    old_version: int | None = None
    new_version: int | None = None
    accepted: bool = True
    reason: str = ""
    by: str = ""
    key: str = ""
    old: dict[str, Any] = field(default_factory=dict)
    new: dict[str, Any] = field(default_factory=dict)

    @property
    def brief(self) -> dict[str, Any]:
        """JSON-ready, without the survival curves, which are long and say nothing to people."""
        return asdict(replace(self, old=_without_survival(self.old), new=_without_survival(self.new)))

    @property
    def line(self) -> str:
        """The event in one line, for the log."""
        about = self.replica or self.model or "all models"
        versions = f": version {self.old_version} -> {self.new_version}" if self.new_version is not None else ""
        author = f" by {self.by or 'an operator'} ({self.key})" if self.key else ""
        taken = "" if self.accepted else "not accepted: "
        changed = changes(self.old, self.new)
        values = f" ({'; '.join(changed)})" if changed else ""
        return f"{self.kind} of {about}{versions}{author}: {taken}{self.reason}{values}"


def together(changed: Iterable[tuple[Event, Thresholds, Thresholds]]) -> list[Event]:
    """The events of one pass, with the old and new thresholds of each. Where more than `_ALIKE` replicas of a model
    change alike, one event is about all of them, so that a thousand replicas do not push all else out of the log."""
    alike: dict[tuple[Any, ...], list[tuple[Event, Thresholds, Thresholds]]] = {}
    for one in changed:
        event = one[0]
        key = (event.kind, event.model, event.accepted, event.reason if event.accepted else "", event.by)
        alike.setdefault(key, []).append(one)
    found = []
    for some in alike.values():
        for event, old, new in some if len(some) <= _ALIKE else some[:1]:
            valued = replace(event, old=thresholds_as_dict(old), new=thresholds_as_dict(new))
            if len(some) > _ALIKE:
                valued = replace(valued, replica="", reason=f"{len(some)} replicas alike: {event.reason}")
            found.append(valued)
    return found


def _without_survival(values: dict[str, Any]) -> dict[str, Any]:
    fluid = values.get("fluid")
    if not isinstance(fluid, dict):
        return values
    return values | {"fluid": {key: value for key, value in fluid.items() if key != "survival"}}


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The numbers and words that differ, as "max_running 32 -> 28", at most `_MOST_CHANGES`; curves are left out."""
    before, after = dict(_plain(old)), dict(_plain(new))
    found = [
        f"{name} {_short(before.get(name))} -> {_short(after.get(name))}"
        for name in dict.fromkeys((*before, *after)) if before.get(name) != after.get(name)
    ]
    more = [f"{len(found) - _MOST_CHANGES} more"] if len(found) > _MOST_CHANGES else []
    return found[:_MOST_CHANGES] + more


def _plain(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            if name not in _CURVES:
                yield from _plain(value, f"{prefix}{name}.")
        elif name in _GROUPS:
            for group in value:
                which = group.get("name", group.get("end_output_tokens"))
                yield f"{prefix}{name}.{which}", group.get("n", group.get("total"))
        elif name not in _SAID_ELSEWHERE and not isinstance(value, list | tuple):
            yield prefix + name, value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)


_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


class EventLog(Sequence[Event]):
    """The latest `KEPT_EVENTS` events, oldest first: read from `store` once; each new one is written there.

    Every method but `latest` blocks on the store. A store that fails costs the memory of a restart, nothing else.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._events: deque[tuple[str, Event]] = deque()
        self._next = 1
        self._read = False

    def __len__(self) -> int:
        return len(self._events)

    def __getitem__(self, index: Any) -> Any:
        return [event for _, event in self._events][index]

    @property
    def latest(self) -> list[dict[str, Any]]:
        """All that are kept, JSON-ready."""
        return [asdict(event) for _, event in tuple(self._events)]

    def read(self) -> None:
        """Take over the events of an earlier controller; later calls do nothing."""
        if self._read:
            return
        keys = self._store.keys(_FOLDER)
        self._read = True
        earlier = [(key, event) for key in keys if (event := _parsed(self._store.get(key))) is not None]
        self._next += max((int(key.removeprefix(_FOLDER)) for key in keys), default=0)
        self._events.extendleft(reversed(earlier))
        self._trim()

    def add(self, event: Event) -> None:
        """Log and keep an event."""
        logger.info("%s", event.line)
        key = f"{_FOLDER}{self._next:012d}"
        self._next += 1
        self._events.append((key, event))
        try:
            self._store.put(key, asdict(event))
            self._trim()
        except Exception:  # the change has happened, whether or not it can be kept
            logger.exception("an event could not be kept")

    def add_all(self, events: Iterable[Event]) -> None:
        """Log and keep several."""
        for event in events:
            self.add(event)

    def _trim(self) -> None:
        while len(self._events) > KEPT_EVENTS:
            key, _ = self._events.popleft()
            self._store.delete(key)


def _parsed(value: Any) -> Event | None:
    try:
        return _EVENT.validate_python(value, extra="ignore")
    except ValidationError:  # of another release
        return None
