"""What the controller records: its estimates of each engine, its own pace, and the replicas that the load needs."""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from replicas.measured import METER, StateMeter
from scheduler.metrics import (
    CHANNEL_SECONDS,
    CONTROLLER_AGE,
    CYCLE_SECONDS,
    ESTIMATES,
    REPLICAS,
    REPLICAS_WANTED,
    SOLVE_SECONDS,
    Meter,
    Metric,
)
from scheduler.tuning.wanted_replicas import Wanted

Shown = Mapping[str, Any]
"""`EngineTuner.shown`."""


def replicas_wanted(shown: list[Shown]) -> int | None:
    """How many engines would have the present load within their capacity, where nothing else is decided.

    The sum of the engines' loads, rounded up, at least 1: an engine's load is its share of what it can serve within the
    targets, else within its memory. None: no engine's load is known.
    """
    loads = [load for one in shown if (load := _load(one)) is not None]
    return max(1, math.ceil(sum(loads) - 1e-9)) if loads else None


def _load(shown: Shown) -> float | None:
    plan = shown.get("forecast") or shown.get("fluid") or {}
    load = plan.get("load")
    return None if load is None else float(load)


class ControllerMeter:
    """Records for one controller. clock: seconds."""

    def __init__(self, meter: Meter = METER, clock: Callable[[], float] = time.monotonic) -> None:
        self._meter, self._clock = meter, clock
        self._engines: dict[str, StateMeter] = {}
        self._ended_s = clock()

    def tell(self, engines: Mapping[str, tuple[str, Shown]], decided: Mapping[str, Wanted] | None = None) -> None:
        """Record the gauges. engines: model and estimates by the name of each engine that was heard of lately. decided:
        how many replicas there should be, by model; of others the loads say it."""
        self._meter.record(CONTROLLER_AGE, self._clock() - self._ended_s, {})
        self._engines = {name: meter for name, meter in self._engines.items() if name in engines}
        by_model: dict[str, list[Shown]] = defaultdict(list)
        for name, (model, shown) in engines.items():
            by_model[model].append(shown)
            if name not in self._engines:
                self._engines[name] = StateMeter(self._meter, ESTIMATES, {"model": model, "replica": name})
            self._engines[name].record(shown)
        for model, estimates in by_model.items():
            self._meter.record(REPLICAS, len(estimates), {"model": model})
        wanted = {model: loads for model, shown in by_model.items() if (loads := replicas_wanted(shown)) is not None}
        for model, number in (wanted | {model: one.replicas for model, one in (decided or {}).items()}).items():
            self._meter.record(REPLICAS_WANTED, number, {"model": model})

    @contextlib.contextmanager
    def cycle(self) -> Iterator[None]:
        """One control cycle; one that fails has not ended."""
        begun_s = self._clock()
        yield
        self._ended_s = self._clock()
        self._meter.record(CYCLE_SECONDS, self._ended_s - begun_s, {})

    def channel(self, model: str) -> contextlib.AbstractContextManager[None]:
        """One question to an engine of a model, and its answer."""
        return self._timed(CHANNEL_SECONDS, (model,))

    def solving(self, models: Collection[str]) -> contextlib.AbstractContextManager[None]:
        """Updating the models of all engines that answered together, and solving for them. models: language models."""
        return self._timed(SOLVE_SECONDS, models)

    @contextlib.contextmanager
    def _timed(self, metric: Metric, models: Collection[str]) -> Iterator[None]:
        begun_s = self._clock()
        yield
        for model in models:
            self._meter.record(metric, self._clock() - begun_s, {"model": model})
