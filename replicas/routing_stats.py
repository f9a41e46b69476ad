"""What a replica tells Serve's request routers about its room, and how a router reads it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, TypeVar

from scheduler.messages import Telemetry

_KEY = "headrace"
logger = logging.getLogger(__name__)
_Replica = TypeVar("_Replica")


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """seats: requests that may be in service at once (the cap, what a pace has in service at capacity, or the engine's
    own limit); occupied: those in service and waiting; kv_used_fraction: share of the KV cache in use."""

    slots: int
    occupied: int
    kv_used_fraction: float

    @classmethod
    def from_telemetry(cls, telemetry: Telemetry) -> RoutingStats:
        """The stats of one engine."""
        thresholds, gauges = telemetry.thresholds, telemetry.gauges
        most = telemetry.limits.max_num_seqs
        # A replica that is slow, or has long answers, is full with fewer than another.
        paced = thresholds.fluid.running_at_capacity if thresholds.fluid else None
        slots = most if paced is None else min(most, max(1, round(paced)))
        return cls(
            slots=thresholds.max_running or slots,
            occupied=gauges.running + gauges.waiting,
            kv_used_fraction=telemetry.kv_used_fraction,
        )

    @classmethod
    def of_engines(cls, telemetry: Sequence[Telemetry]) -> RoutingStats:
        """The stats of a replica's engines together: the room of all, as vLLM spreads its requests over them."""
        each = [cls.from_telemetry(report) for report in telemetry]
        capacity = sum(report.limits.kv_capacity_tokens for report in telemetry)
        return cls(
            slots=sum(stats.slots for stats in each), occupied=sum(stats.occupied for stats in each),
            kv_used_fraction=sum(report.gauges.kv_used_tokens for report in telemetry) / capacity,
        )

    @classmethod
    def from_dict(cls, routing_stats: Mapping[str, Any]) -> RoutingStats | None:
        """The stats a replica reported; None when it reported none, or something else."""
        raw = routing_stats.get(_KEY)
        try:
            return cls(**raw) if isinstance(raw, dict) else None
        except TypeError:  # a replica of another version during a rolling upgrade
            _warn_once(", ".join(sorted(map(str, raw or ()))))
            return None

    def as_dict(self) -> dict[str, Any]:
        """The form in which Serve carries it."""
        return {_KEY: asdict(self)}

    def slack(self, ongoing: int) -> float:
        """Free seats as a share of all, given the router's own, fresher count of ongoing requests; may be negative."""
        return (self.slots - max(self.occupied, ongoing)) / self.slots


@lru_cache(maxsize=16)
def _warn_once(reported: str) -> None:
    logger.warning(
        "a replica reports its room as %s, and not as %s: another version? It is ranked last",
        reported or "nothing", ", ".join(field.name for field in fields(RoutingStats)),
    )


