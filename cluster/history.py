"""The last quarter of an hour of every engine, a point for each control cycle: what the dashboard's charts show.

Kept in the controller's memory alone: a new controller begins anew. Of bounded size.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scheduler.digest import Period
from scheduler.estimation.engine_records import period_of
from scheduler.messages import Counters, Telemetry, slots_of
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.tuning.slo import Slo

KEPT_S = 900.0
KEPT_POINTS = 450
"""Of one engine: a quarter of an hour of cycles of two seconds, and less of shorter ones."""
KEPT_IN_ALL = 30_000
"""Points of all engines together, some 30 MB: with more than 66 engines, each keeps fewer, down to `_LEAST_KEPT`."""
_LEAST_KEPT = 8
_DIGITS = 6


class Point(NamedTuple):
    """One engine over the `seconds` before `at_unix_s`; numbers of requests are of that time, not totals.

    admitted: requests whose prefill began. rejected_*: by reason, see `Counters`. good: completed within every target;
        without targets, completed. audited,
        audited_met: of the requests that the policy would have rejected and that were served, those that completed, and
        those of them within every target.
    ttft_s, tpot_s: medians of completed requests, and their 0.95 quantiles as *_slow_s; *_target_s: the targets.
    running, waiting: requests at the end; slots: most that may run; queue_limit: most that may wait.
    kv_*_tokens: in use, in all, and in the fluid equilibrium (M*).
    iteration_s, predicted_s: mean seconds of the iterations, as measured and as the model said before it saw them.
    capacity_rps: requests per second within the targets, by the fluid model.
    None: not known, or no such request.
    """

    at_unix_s: float
    seconds: float
    arrivals: int
    admitted: int
    rejected: int
    rejected_queue_full: int
    rejected_too_late: int
    rejected_front_door: int
    completed: int
    good: int
    audited: int
    audited_met: int
    preemptions: int
    ttft_s: float | None
    ttft_slow_s: float | None
    ttft_target_s: float | None
    tpot_s: float | None
    tpot_slow_s: float | None
    tpot_target_s: float | None
    running: int
    waiting: int
    slots: int
    queue_limit: int | None
    kv_used_tokens: int
    kv_capacity_tokens: int
    kv_planned_tokens: float | None
    iteration_s: float | None
    predicted_s: float | None
    capacity_rps: float | None
    version: int
    pinned: bool


COUNTED = ("seconds", "arrivals", "admitted", "rejected", "completed", "good", "audited", "audited_met", "preemptions")
"""Fields that add up over points."""


@dataclass(slots=True)
class _Series:
    """Of one engine: its points, and where the next one begins."""

    model: str
    points: deque[Point] = field(default_factory=lambda: deque(maxlen=KEPT_POINTS))
    engine_id: str = ""
    clock_s: float = 0.0
    counters: Counters = field(default_factory=Counters)
    admitted: int = 0
    cursor: int = 0
    moved_s: float = 0.0
    seen_unix_s: float = 0.0


class History:
    """The series of every engine, by name. Other threads may read while one writes."""

    def __init__(self) -> None:
        self._series: dict[str, _Series] = {}

    def observe(
        self, name: str, model: str, at_unix_s: float, telemetry: Telemetry, *, targets: Slo,
        predicted_by: IterationTimeModel | None, shown: Mapping[str, Any],
    ) -> None:
        """Take in a report. predicted_by: the iteration-time model before it saw this report; shown: the estimates, as
        `EngineTuner.shown`. The first report of an engine only says where counting begins."""
        series = self._series.setdefault(name, _Series(model))
        admitted = _admitted(telemetry)
        if telemetry.engine_id == series.engine_id and telemetry.clock_s > series.clock_s:
            series.points.append(_point(series, at_unix_s, telemetry, admitted, targets, predicted_by, shown))
            is_idle = not telemetry.gauges.running
            if is_idle or telemetry.counters.iterations > series.counters.iterations:
                series.moved_s = telemetry.clock_s
        elif telemetry.engine_id != series.engine_id:
            series.moved_s = telemetry.clock_s
        series.engine_id, series.clock_s, series.seen_unix_s = telemetry.engine_id, telemetry.clock_s, at_unix_s
        series.counters, series.admitted, series.cursor = telemetry.counters, admitted, telemetry.cursor

    def keep_only(self, now_unix_s: float) -> None:
        """Forget what is older than `KEPT_S` or too much, and engines that have not reported since."""
        most = max(_LEAST_KEPT, KEPT_IN_ALL // max(1, len(self._series)))
        for name, series in tuple(self._series.items()):
            while len(series.points) > most or (series.points and series.points[0].at_unix_s < now_unix_s - KEPT_S):
                series.points.popleft()
            if series.seen_unix_s < now_unix_s - KEPT_S:
                del self._series[name]

    def still_s(self, name: str) -> float:
        """For how many seconds an engine that has running requests has run no iteration, as last seen."""
        series = self._series.get(name)
        return series.clock_s - series.moved_s if series else 0.0

    def recent(self, name: str, seconds: float) -> dict[str, float]:
        """What is counted (`COUNTED`) over the latest points that together cover `seconds`."""
        points, covered = list[Point](), 0.0
        series = self._series.get(name)
        for point in reversed(tuple(series.points) if series else ()):
            if covered >= seconds:
                break
            points.append(point)
            covered += point.seconds
        return {key: sum(getattr(point, key) for point in points) for key in COUNTED}

    def columns(self, after_unix_s: float = -math.inf) -> dict[str, Any]:
        """The points newer than `after_unix_s`, JSON-ready: by engine its model and one list for each field."""
        return {
            name: {"model": series.model}
            | _columns([one for one in tuple(series.points) if one.at_unix_s > after_unix_s])
            for name, series in tuple(self._series.items())
        }


def _columns(points: Sequence[Point]) -> dict[str, list[Any]]:
    return {
        name: [_short(getattr(point, name)) for point in points] if name != "at_unix_s" else
        [round(point.at_unix_s, 3) for point in points]
        for name in Point._fields
    }


def _short(value: Any) -> Any:
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _admitted(telemetry: Telemetry) -> int:
    counters = telemetry.counters
    return counters.arrivals - counters.rejected - counters.recalled - telemetry.gauges.waiting


def _point(
    series: _Series, at_unix_s: float, telemetry: Telemetry, admitted: int, targets: Slo,
    predicted_by: IterationTimeModel | None, shown: Mapping[str, Any],
) -> Point:
    counters, gauges, thresholds = telemetry.counters, telemetry.gauges, telemetry.thresholds
    period = _period(series, telemetry, predicted_by)
    fluid, forecast = shown.get("fluid") or {}, shown.get("forecast") or {}

    def counted(name: str) -> int:
        return int(getattr(counters, name) - getattr(series.counters, name))

    return Point(
        at_unix_s=at_unix_s, seconds=telemetry.clock_s - series.clock_s, arrivals=counted("arrivals"),
        admitted=max(0, admitted - series.admitted), rejected=counted("rejected"),
        rejected_queue_full=counted("rejected_queue_full"), rejected_too_late=counted("rejected_too_late"),
        rejected_front_door=counted("rejected_front_door"), completed=counted("completed"), good=counted("good"),
        audited=counted("audited"), audited_met=counted("audited_met"), preemptions=counted("preemptions"),
        ttft_s=period.ttft_s, ttft_slow_s=period.ttft_slow_s, ttft_target_s=targets.ttft_s, tpot_s=period.tpot_s,
        tpot_slow_s=period.tpot_slow_s, tpot_target_s=targets.tpot_s,
        running=gauges.running, waiting=gauges.waiting,
        slots=slots_of(telemetry.limits, thresholds),
        queue_limit=thresholds.fluid.queue_limit if thresholds.fluid else None,
        kv_used_tokens=gauges.kv_used_tokens, kv_capacity_tokens=telemetry.limits.kv_capacity_tokens,
        kv_planned_tokens=fluid.get("memory_tokens"),
        iteration_s=period.iteration_s, predicted_s=period.predicted_s,
        capacity_rps=forecast.get("capacity_rps"), version=thresholds.version, pinned=thresholds.pinned,
    )


def _period(series: _Series, telemetry: Telemetry, predicted_by: IterationTimeModel | None) -> Period:
    if telemetry.digest is not None:
        return telemetry.digest.period
    done = [one for one in telemetry.finished if one.seq > series.cursor and not one.aborted]
    return period_of([one for one in telemetry.iterations if one.seq > series.cursor], done, predicted_by)
