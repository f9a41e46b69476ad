"""Keeps what is recorded as metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from scheduler.metrics import Kind, Metric

Key = tuple[str, tuple[tuple[str, str], ...]]


class FakeMeter:
    """Gauges and sums of counters by name and labels; every observation of a histogram."""

    def __init__(self) -> None:
        self.values: dict[Key, float] = defaultdict(float)
        self.observed: dict[Key, list[float]] = defaultdict(list)

    def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        assert set(labels) == set(metric.labels), f"{metric.name} has the labels {metric.labels}"
        assert all(isinstance(label, str) for label in labels.values())
        key = metric.exposed, tuple(sorted(labels.items()))
        if metric.kind is Kind.HISTOGRAM:
            self.observed[key].append(value)
        elif metric.kind is Kind.GAUGE:
            self.values[key] = float(value)
        else:
            assert value >= 0, f"{metric.name} fell"
            self.values[key] += value

    def value(self, metric: Metric, **labels: str) -> float | None:
        """None: never recorded."""
        return self.values.get((metric.exposed, tuple(sorted(labels.items()))))

    def seconds(self, metric: Metric, **labels: str) -> list[float]:
        return self.observed.get((metric.exposed, tuple(sorted(labels.items()))), [])
