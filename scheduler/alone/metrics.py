"""The state of a server's engines as Prometheus metrics, for vLLM's own `/metrics`: those of `scheduler/metrics.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from scheduler.metrics import ENGINE, ESTIMATES, OF_CONTROLLER, Kind, samples

_METRICS = (*ENGINE, *ESTIMATES, *OF_CONTROLLER)
Family = CounterMetricFamily | GaugeMetricFamily


def exposition(state: Mapping[str, Any]) -> bytes:
    """`Engines.state` in Prometheus's text format; label `engine`: the data-parallel rank."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_OfState(state["engines"]))
    return generate_latest(registry)


class _OfState(Collector):
    def __init__(self, engines: Mapping[str, Mapping[str, Any]]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[Family]:
        families: dict[str, Family] = {}
        for metric in _METRICS:
            kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
            families[metric.name] = kind(metric.name, metric.help, labels=["engine", *metric.own_labels])
        for rank, state in self._engines.items():
            for metric, labels, value in samples(_METRICS, state):
                families[metric.name].add_metric([rank, *(labels[label] for label in metric.own_labels)], value)
        return families.values()
