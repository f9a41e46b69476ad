"""Records the metrics of `scheduler/metrics.py` through Ray, whose metrics agent on each node exports them.

A gauge is exported only while it is recorded again, so every process records its gauges every few seconds: those of a
process that hangs or ends, and of replicas that are gone, vanish within half a minute. Counters and histograms of an
ended process stay with the agent, as all of Ray's do.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from ray.util import metrics as ray_metrics

from scheduler.messages import Telemetry
from scheduler.metrics import (
    ENGINE,
    TPOT_SECONDS,
    UNKNOWN,
    WAITING_SECONDS,
    Kind,
    Meter,
    Metric,
    State,
    samples,
)
from scheduler.settings import TENANT

TELL_EVERY_S = 4.0
"""Less than half of the ten seconds in which Ray exports what a process recorded."""
_NOTHING = sys.float_info.min
"""A counter is there from its first record on, at 0, and Ray's counters take nothing but growth."""
logger = logging.getLogger(__name__)


class RayMeter:
    """The metrics of this process, each made when it is first recorded."""

    def __init__(self) -> None:
        self._instruments: dict[str, Any] = {}

    def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Set a gauge, add to a counter, or observe in a histogram."""
        instrument = self._instruments.get(metric.name)
        if instrument is None:
            instrument = self._instruments[metric.name] = _made(metric)
        if metric.kind is Kind.GAUGE:
            instrument.set(value, tags=dict(labels))
        elif metric.kind is Kind.HISTOGRAM:
            instrument.observe(value, tags=dict(labels))
        else:
            instrument.inc(value or _NOTHING, tags=dict(labels))


def _made(metric: Metric) -> Any:
    if metric.kind is Kind.HISTOGRAM:
        return ray_metrics.Histogram(
            metric.exposed, description=metric.help, boundaries=list(metric.buckets), tag_keys=metric.labels
        )
    kind = ray_metrics.Gauge if metric.kind is Kind.GAUGE else ray_metrics.Counter
    return kind(metric.exposed, description=metric.help, tag_keys=metric.labels)


METER = RayMeter()
"""That of this process."""


class StateMeter:
    """Records one engine's state again and again: gauges as they are, counters by what they have grown.

    labels: model and replica. An engine with another `engine_id` counts from 0.
    """

    def __init__(self, meter: Meter, metrics: Iterable[Metric], labels: Mapping[str, str]) -> None:
        self._meter, self._metrics, self._labels = meter, tuple(metrics), dict(labels)
        self._before: dict[tuple[str, ...], float] = {}
        self._engine_id: Any = None

    def record(self, state: State) -> None:
        """Record what the state holds; what it lacks is left out."""
        engine_id = state.get("engine_id", self._engine_id)
        if engine_id != self._engine_id:
            self._before, self._engine_id = {}, engine_id
        for metric, own, value in samples(self._metrics, state):
            if metric.kind is Kind.COUNTER:
                key = (metric.name, *own.values())
                value, self._before[key] = value - self._before.get(key, 0.0), value
            self._meter.record(metric, value, self._labels | own)


def tenant_in(request: Any) -> str:
    """The tenant that the ingress wrote into a request; `UNKNOWN` where it has none."""
    return str((getattr(request, "vllm_xargs", None) or {}).get(TENANT, UNKNOWN))


class RequestMeter:
    """Records the times of one replica's requests, by tenant."""

    def __init__(self, model: str, meter: Meter = METER) -> None:
        self._model, self._meter = model, meter

    def record(self, tenant: str, waited_s: float, tpot_s: float | None) -> None:
        """One completed request: seconds in the engine's queue, and per output token (None: a single token)."""
        labels = {"model": self._model, "tenant": tenant}
        self._meter.record(WAITING_SECONDS, waited_s, labels)
        if tpot_s is not None:
            self._meter.record(TPOT_SECONDS, tpot_s, labels)


async def keep_telling(tell: Callable[[], Awaitable[None]], every_s: float = TELL_EVERY_S) -> None:
    """Call `tell` every few seconds until cancelled; a failure is logged once and tried again."""
    said = ""
    while True:
        try:
            await tell()
            said = ""
        except Exception as error:
            if said != (said := repr(error)):
                logger.warning("metrics could not be recorded, trying again: %s", said)
        await asyncio.sleep(every_s)


class EnginesMeter:
    """Records what the engines of one replica know of themselves.

    names: of the engines, by rank. ask: one engine's telemetry without records; raises when the engine does not answer.
    """

    def __init__(
        self, model: str, names: Iterable[str], ask: Callable[[int], Awaitable[Telemetry]], meter: Meter = METER
    ) -> None:
        self._ask = ask
        self._meters = [StateMeter(meter, ENGINE, {"model": model, "replica": name}) for name in names]

    async def tell(self) -> None:
        """Record the present state of each; an engine that does not answer is recorded as such."""
        await asyncio.gather(*(self._tell(rank, meter) for rank, meter in enumerate(self._meters)))

    async def _tell(self, rank: int, meter: StateMeter) -> None:
        try:
            telemetry = await self._ask(rank)
        except Exception:  # silent, starting or of another release
            meter.record({"reachable": False})
        else:
            meter.record({"reachable": True, **telemetry.shown()})
