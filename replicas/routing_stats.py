"""`RoutingStats`: slots and occupancy of a replica, as Serve carries them to the request routers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

from scheduler.messages import Stats

_KEY = "headrace"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """slots: requests that may run at once before the replica counts as full (`scheduler.messages.Stats`); occupied:
    requests that run or wait; kv_used_fraction: share of the KV cache in use."""

    slots: int
    occupied: int
    kv_used_fraction: float

    @classmethod
    def of_engines(cls, engines: Sequence[Stats]) -> RoutingStats:
        """The sums over a replica's engines, over which vLLM spreads its requests."""
        return cls(
            slots=sum(stats.slots for stats in engines),
            occupied=sum(stats.running + stats.waiting for stats in engines),
            kv_used_fraction=(
                sum(stats.kv_used_tokens for stats in engines) / sum(stats.kv_capacity_tokens for stats in engines)
            ),
        )

    @classmethod
    def from_dict(cls, routing_stats: Mapping[str, Any]) -> RoutingStats | None:
        """The stats a replica reported; None when it reported none or in another form."""
        raw = routing_stats.get(_KEY)
        try:
            return cls(**raw) if isinstance(raw, dict) else None
        except TypeError:  # a replica of another version during a rolling upgrade
            _warn_once(", ".join(sorted(map(str, raw or ()))))
            return None

    def as_dict(self) -> dict[str, Any]:
        """As a dict, the form in which Serve carries it."""
        return {_KEY: asdict(self)}

    def slack(self, ongoing: int) -> float:
        """Free slots as a share of all, given the router's own, fresher count of ongoing requests; may be negative."""
        return (self.slots - max(self.occupied, ongoing)) / self.slots


@lru_cache(maxsize=16)
def _warn_once(reported: str) -> None:
    logger.warning(
        "a replica reports the routing stats %s instead of %s, so it is ranked last; does it run another release?",
        reported or "nothing", ", ".join(field.name for field in fields(RoutingStats)),
    )
