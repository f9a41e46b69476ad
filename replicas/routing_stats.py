"""`RoutingStats`: the state of a replica, as Serve carries it to the request routers."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from replicas.marks import Marks
from scheduler.messages import Outlook, Stats

_KEY, _MARKS_KEY = "headrace", "headrace_marks"
"""Apart, so that a router of a release that knows no marks reads the rest."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """slots: requests that may run at once before the replica counts as full (`scheduler.messages.Stats`); occupied:
    requests that run or wait; kv_used_fraction: share of the KV cache in use. room: how many more requests it takes
    before it rejects one (None: it rejects none). outlook: of a request that arrives (None: not predicted). at_s: when,
    by the wall clock (None: a replica of a release that does not say). kv_capacity_tokens: of all engines.
    prompt_tokens, cached_tokens: of the prompts that have run so far, and of these, found in the prefix cache.
    marks: of the prompts that it computed lately (None: it does not say)."""

    slots: int
    occupied: int
    kv_used_fraction: float
    room: int | None = None
    outlook: Outlook | None = None
    at_s: float | None = None
    kv_capacity_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    marks: Marks | None = None

    @classmethod
    def of_engines(
        cls, engines: Sequence[Stats], at_s: float | None = None, marks: Marks | None = None
    ) -> RoutingStats:
        """The sums over a replica's engines, over which vLLM spreads its requests."""
        rooms = [stats.room for stats in engines]
        kv_capacity_tokens = sum(stats.kv_capacity_tokens for stats in engines)
        return cls(
            slots=sum(stats.slots for stats in engines),
            occupied=sum(stats.running + stats.waiting for stats in engines),
            kv_used_fraction=sum(stats.kv_used_tokens for stats in engines) / kv_capacity_tokens,
            room=None if None in rooms else sum(filter(None, rooms)),
            outlook=_together([stats.outlook for stats in engines]),
            at_s=at_s,
            kv_capacity_tokens=kv_capacity_tokens,
            prompt_tokens=sum(stats.prompt_tokens for stats in engines),
            cached_tokens=sum(stats.cached_tokens for stats in engines),
            marks=marks,
        )

    @classmethod
    def from_dict(cls, routing_stats: Mapping[str, Any]) -> RoutingStats | None:
        """The stats a replica reported; None when it reported none or in another form."""
        raw = routing_stats.get(_KEY)
        try:
            if not isinstance(raw, dict):
                return None
            read = {"outlook": _read(raw.get("outlook")), "marks": Marks.read(routing_stats.get(_MARKS_KEY))}
            return _checked(cls(**raw | read))
        except (TypeError, ValueError, OverflowError):  # a replica of another version during a rolling upgrade
            _warn_once(", ".join(sorted(map(str, raw or ()))))
            return None

    def as_dict(self) -> dict[str, Any]:
        """As a dict, the form in which Serve carries it."""
        # Plain tuples, so that Serve's controller can read it without this package.
        known = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "marks"}
        stats = {_KEY: known | {"outlook": None if self.outlook is None else tuple(self.outlook)}}
        return stats if self.marks is None else stats | {_MARKS_KEY: tuple(self.marks)}

    def slack(self, occupied: float) -> float:
        """Free slots as a share of all, with so many occupied; may be negative."""
        return (self.slots - occupied) / self.slots


class ReadReports:
    """The latest report of each replica, read once: a router asks for each with every request."""

    def __init__(self) -> None:
        self._read: dict[str, tuple[Mapping[str, Any], RoutingStats | None]] = {}

    def of(self, replica: str, routing_stats: Mapping[str, Any]) -> RoutingStats | None:
        """What `RoutingStats.from_dict` makes of it; another report is another dict."""
        read = self._read.get(replica)
        if read is None or read[0] is not routing_stats:
            read = self._read[replica] = routing_stats, RoutingStats.from_dict(routing_stats)
        return read[1]

    def keep(self, replicas: Collection[str]) -> None:
        """Forget all but these replicas."""
        for replica in self._read.keys() - set(replicas):
            self._read.pop(replica, None)


def _read(outlook: Sequence[float] | None) -> Outlook | None:
    return None if outlook is None else Outlook(*map(_number, outlook))


def _checked(stats: RoutingStats) -> RoutingStats:
    """These, if every field is a number where there is to be one; a TypeError or ValueError otherwise."""
    for field in fields(RoutingStats):
        value = getattr(stats, field.name)
        if field.name not in ("outlook", "marks") and (value is not None or field.name not in ("room", "at_s")):
            _number(value)
    if stats.slots < 1:
        raise ValueError("a replica without slots")
    return stats


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise TypeError(f"{value!r} is no number")
    return value


def _together(outlooks: Sequence[Outlook | None]) -> Outlook | None:
    """One outlook for engines that share a replica's requests: each takes its part of the prompts, and the waits and
    token times are their means."""
    known = [outlook for outlook in outlooks if outlook is not None]
    if not known or len(known) < len(outlooks):
        return None
    means = Outlook(*(sum(values) / len(known) for values in zip(*known, strict=True)))
    return means._replace(prompt_s=means.prompt_s / len(known), added_s=means.added_s / len(known))


@lru_cache(maxsize=16)
def _warn_once(reported: str) -> None:
    logger.warning(
        "a replica reports the routing stats %s instead of %s, so it is ranked last; does it run another release?",
        reported or "nothing", ", ".join(field.name for field in fields(RoutingStats)),
    )
