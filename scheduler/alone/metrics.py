"""The state of a server's engines as Prometheus metrics, for vLLM's own `/metrics`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_Path = tuple[str, ...]
GAUGES: tuple[tuple[str, str, _Path], ...] = (
    ("headrace_engine_up", "Whether the engine answers on its control channel.", ("reachable",)),
    ("headrace_thresholds_version", "Version of the active thresholds.", ("thresholds", "version")),
    ("headrace_thresholds_pinned", "Whether an operator has pinned the active thresholds.", ("thresholds", "pinned")),
    ("headrace_thresholds_configured", "1 while no learnt thresholds are active.", ("from_config",)),
    ("headrace_requests_running", "Running requests.", ("running",)),
    ("headrace_requests_waiting", "Waiting requests, held ones included.", ("waiting",)),
    ("headrace_requests_held", "Requests that the policy holds.", ("held",)),
    ("headrace_kv_used_tokens", "KV cache in use, in tokens.", ("kv_used_tokens",)),
    ("headrace_kv_capacity_tokens", "Size of the KV cache (C), in tokens.", ("limits", "kv_capacity_tokens")),
    ("headrace_controller_up", "Whether the controller process of the engine runs.", ("controller", "alive")),
    ("headrace_controller_age_seconds", "Time since its latest control cycle.", ("controller", "age_s")),
    ("headrace_arrival_rate", "Requests per second that the controller sees.", ("rate_rps",)),
    ("headrace_load", "Load of the fluid model (1: capacity).", ("fluid", "load")),
    ("headrace_iteration_seconds", "Iteration time at the fluid equilibrium.", ("fluid", "iteration_time_s")),
    ("headrace_memory_tokens", "KV cache in use at the fluid equilibrium (M*).", ("fluid", "memory_tokens")),
    ("headrace_capacity_rate", "Requests per second possible within the targets.", ("forecast", "capacity_rps")),
    ("headrace_goodput_rate", "Requests per second expected within the targets.", ("forecast", "goodput_rps")),
    ("headrace_time_model_error_ratio", "Mean error of recent iteration times.", ("time_model", "mape")),
)
"""Name, help, and place in the engine's state; an absent value gives no sample."""
WORDS: tuple[tuple[str, str, str, _Path], ...] = (
    ("headrace_policy", "The active policy.", "policy", ("thresholds", "policy")),
    ("headrace_bottleneck", "What limits the engine.", "bottleneck", ("forecast", "bottleneck")),
)
"""The same for words, which become the value of a label; the sample is 1."""
COUNTERS: tuple[tuple[str, str, str, Mapping[str, str]], ...] = (
    ("headrace_arrivals", "Requests that reached the engine, one for each choice.", "arrivals", {}),
    ("headrace_completed", "Requests that ended by themselves.", "completed", {}),
    ("headrace_aborted", "Requests ended by their client, the server or an error.", "aborted", {}),
    ("headrace_rejected", "Requests rejected before any work.", "rejected", {}),
    ("headrace_recalled", "Requests sent back before any work by an engine that stops.", "recalled", {}),
    ("headrace_target_misses", "Completed requests that missed a target.", "ttft_misses", {"target": "ttft"}),
    ("headrace_target_misses", "", "tpot_misses", {"target": "tpot"}),
    ("headrace_target_misses", "", "latency_misses", {"target": "latency"}),
    ("headrace_audited", "Requests served although they would have been rejected.", "audited", {}),
    ("headrace_audited_met", "Of these, requests that met every target.", "audited_met", {}),
    ("headrace_preemptions", "Preempted requests.", "preemptions", {}),
    ("headrace_iterations", "Executed iterations.", "iterations", {}),
    ("headrace_hold_seconds", "Time for which released requests were held, summed.", "hold_s", {}),
)
"""Name without `_total`, help, key in the engine's counters, further labels."""


def exposition(state: Mapping[str, Any]) -> bytes:
    """`Engines.state` in Prometheus's text format; label `engine`: the data-parallel rank."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_OfState(state["engines"]))
    return generate_latest(registry)


class _OfState(Collector):
    def __init__(self, engines: Mapping[str, Mapping[str, Any]]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[Metric]:
        for name, help_text, path in GAUGES:
            yield _gauge(name, help_text, {(rank,): found for rank, found in self._found(path)})
        for name, help_text, label, path in WORDS:
            yield _gauge(name, help_text, {(rank, str(found)): 1.0 for rank, found in self._found(path)}, label)
        counters: dict[str, CounterMetricFamily] = {}
        for name, help_text, key, labels in COUNTERS:
            family = counters.setdefault(name, CounterMetricFamily(name, help_text, labels=["engine", *labels]))
            for rank, found in self._found(("counters", key)):
                family.add_metric([rank, *labels.values()], found)
        yield from counters.values()

    def _found(self, path: _Path) -> Iterator[tuple[str, Any]]:
        for rank, state in self._engines.items():
            found: Any = state
            for key in path:
                found = found.get(key) if isinstance(found, Mapping) else None
            if found is not None:
                yield rank, found


def _gauge(
    name: str, help_text: str, samples: Mapping[tuple[str, ...], float], *labels: str
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help_text, labels=["engine", *labels])
    for values, sample in samples.items():
        family.add_metric(list(values), float(sample))
    return family
