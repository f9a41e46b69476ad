"""Every metric of Headrace as data: name, kind, unit, labels, and where its value comes from.

One list for the cluster, which records them through Ray (`replicas/measured.py`), for plain `vllm serve`, which adds
them to vLLM's own `/metrics` (`scheduler/alone/metrics.py`), and for the reference page (`cluster/metrics_page.py`).
Labels are bounded: models, replicas and tenants there are, reasons and outcomes of this list; never a request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

State = Mapping[str, Any]
"""One engine as a state shows it: `Telemetry.shown()`, and the estimates of `EngineTuner.shown` beside it."""
Samples = Iterator[tuple[dict[str, str], float]]
Read = Callable[[State], Samples]
OF_ENGINE = ("model", "replica")
OF_REQUEST = ("model", "tenant")
UNKNOWN = "none"
"""The model or tenant of a request that has none, or that is refused before it is known."""
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
_TOKEN_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1.5, 3.0)
_SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Kind(StrEnum):
    """What Prometheus calls it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Source(StrEnum):
    """Which process measures it."""

    REPLICA = "replica"
    CONTROLLER = "controller"
    INGRESS = "ingress"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric.

    name: a counter's without `_total`. help: ASCII, all that Ray takes. unit: of a value, in words. labels: their
    names. read: its samples in an engine's state, each with the labels beyond model and replica; None: recorded event
    by event. buckets: upper bounds of a histogram, in seconds.
    """

    name: str
    kind: Kind
    help: str
    unit: str
    source: Source
    labels: tuple[str, ...] = OF_ENGINE
    read: Read | None = None
    buckets: tuple[float, ...] = ()

    @property
    def alone(self) -> bool:
        """Whether an engine's state has it, and so plain `vllm serve` too."""
        return self.read is not None

    @property
    def own_labels(self) -> tuple[str, ...]:
        """The labels beyond those that say which engine."""
        return tuple(label for label in self.labels if label not in OF_ENGINE)

    @property
    def exposed(self) -> str:
        """The name in a scrape, without the `ray_` that Ray puts before every name."""
        return f"{self.name}_total" if self.kind is Kind.COUNTER else self.name


class Meter(Protocol):
    """Where one process records its metrics."""

    def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Set a gauge, add to a counter, or observe in a histogram."""


class _NoMeter:
    def record(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Nothing is recorded."""


NO_METER: Meter = _NoMeter()


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, bool | int | float) and math.isfinite(value) else None


def _found(state: Any, path: Iterable[str]) -> Any:
    for key in path:
        state = state.get(key) if isinstance(state, Mapping) else None
    return state


def _at(*path: str) -> Read:
    """The number, or truth, at a place in the state; none where it is missing."""

    def read(state: State) -> Samples:
        value = _number(_found(state, path))
        if value is not None:
            yield {}, value

    return read


def _word(label: str, *path: str) -> Read:
    """The word at a place, as the value of a label; the sample is 1."""

    def read(state: State) -> Samples:
        word = _found(state, path)
        if word is not None:
            yield {label: str(word)}, 1.0

    return read


def _cases(label: str, paths: Mapping[str, tuple[str, ...]]) -> Read:
    """Numbers at several places, told apart by the value of a label."""

    def read(state: State) -> Samples:
        for case, path in paths.items():
            value = _number(_found(state, path))
            if value is not None:
                yield {label: case}, value

    return read


def _counter(name: str) -> Read:
    return _at("counters", name)


def _groups(state: State) -> Samples:
    """WAIT's n of each type, Nested WAIT's total of each segment, which is named for its last output token."""
    thresholds = state.get("thresholds") or {}
    for entry in thresholds.get("types") or ():
        if entry.get("n") is not None:
            yield {"segment": str(entry["name"])}, float(entry["n"])
    for entry in thresholds.get("segments") or ():
        yield {"segment": f"to {entry['end_output_tokens']}"}, float(entry["total"])


def _of_engine(name: str, help_text: str, unit: str, read: Read, *labels: str, kind: Kind = Kind.GAUGE) -> Metric:
    return Metric(
        name=name, kind=kind, help=help_text, unit=unit, source=Source.REPLICA, labels=(*OF_ENGINE, *labels), read=read,
    )


def _count(name: str, help_text: str, unit: str, read: Read, *labels: str) -> Metric:
    return _of_engine(name, help_text, unit, read, *labels, kind=Kind.COUNTER)


def _estimate(name: str, help_text: str, unit: str, read: Read, *labels: str) -> Metric:
    return Metric(
        name=name, kind=Kind.GAUGE, help=help_text, unit=unit, source=Source.CONTROLLER, labels=(*OF_ENGINE, *labels),
        read=read,
    )


_REQUESTS, _TOKENS, _RATE = "requests", "tokens", "requests per second"
REJECTED_REASONS = ("too_late", "queue_full", "front_door")

ENGINE: tuple[Metric, ...] = (
    _of_engine("headrace_engine_up", "Whether the engine answers on its control channel.", "0 or 1", _at("reachable")),
    _of_engine("headrace_requests_running", "Running requests.", _REQUESTS, _at("running")),
    _of_engine("headrace_requests_waiting", "Waiting requests, held ones included.", _REQUESTS, _at("waiting")),
    _of_engine("headrace_requests_held", "Waiting requests that the policy holds back.", _REQUESTS, _at("held")),
    _of_engine("headrace_requests_paused", "Running requests that sit out this one.", _REQUESTS, _at("sitting_out")),
    _of_engine("headrace_slots", "Requests that may run before the engine counts as full.", _REQUESTS, _at("slots")),
    _of_engine("headrace_kv_used_tokens", "KV cache in use.", _TOKENS, _at("kv_used_tokens")),
    _of_engine(
        "headrace_kv_capacity_tokens", "Size of the KV cache (C).", _TOKENS, _at("limits", "kv_capacity_tokens")
    ),
    _of_engine("headrace_draining", "Whether the engine admits nothing more, as it stops.", "0 or 1", _at("draining")),
    _of_engine("headrace_policy", "The active policy.", "1", _word("policy", "thresholds", "policy"), "policy"),
    _of_engine(
        "headrace_thresholds_version", "Version of the active thresholds; grows with each change.", "version",
        _at("thresholds", "version"),
    ),
    _of_engine(
        "headrace_thresholds_pinned", "Whether an operator has pinned the active thresholds.", "0 or 1",
        _at("thresholds", "pinned"),
    ),
    _of_engine(
        "headrace_thresholds_configured", "1 while no learnt thresholds are active.", "0 or 1", _at("from_config")
    ),
    _of_engine(
        "headrace_threshold_group_requests", "WAIT's n of a type, Nested WAIT's total of a segment.", _REQUESTS,
        _groups, "segment",
    ),
    _of_engine(
        "headrace_threshold_running_requests", "Most running requests by the active thresholds.", _REQUESTS,
        _at("thresholds", "max_running"),
    ),
    _of_engine(
        "headrace_threshold_queue_requests", "Most waiting requests by the active thresholds; more are rejected.",
        _REQUESTS, _at("thresholds", "fluid", "queue_limit"),
    ),
    _of_engine(
        "headrace_threshold_iteration_seconds", "Longest iteration by the active thresholds.", "seconds",
        _at("thresholds", "fluid", "iteration_s"),
    ),
    _count(
        "headrace_arrivals", "Requests for the engine, one for each choice; those that the ingress rejected for it "
        "included.", _REQUESTS, _counter("arrivals"),
    ),
    _count("headrace_completed", "Requests that ended by themselves.", _REQUESTS, _counter("completed")),
    _count(
        "headrace_good", "Completed requests that met every target in force, or for which none is.", _REQUESTS,
        _counter("good"),
    ),
    _count(
        "headrace_aborted", "Requests ended by their client, the server or an error.", _REQUESTS, _counter("aborted")
    ),
    _count(
        "headrace_rejected", "Requests rejected before any work: too_late (the first token could not meet its "
        "target), queue_full (one more could not), front_door (the ingress knew that all queues are full).", _REQUESTS,
        _cases("reason", {reason: ("counters", f"rejected_{reason}") for reason in REJECTED_REASONS}), "reason",
    ),
    _count(
        "headrace_recalled", "Requests sent back before any work by an engine that stops; another serves them.",
        _REQUESTS, _counter("recalled"),
    ),
    _of_engine(
        "headrace_requests_in_flight", "Arrivals less all that ended: completed, aborted, rejected, recalled.",
        _REQUESTS, _at("counters", "in_flight"),
    ),
    _count(
        "headrace_target_misses", "Completed requests that missed a target.", _REQUESTS,
        _cases("target", {name: ("counters", f"{name}_misses") for name in ("ttft", "tpot", "latency")}), "target",
    ),
    _count(
        "headrace_audited", "Requests served although they would have been rejected.", _REQUESTS, _counter("audited")
    ),
    _count(
        "headrace_audited_met", "Of these, requests that met every target: wrong rejections.", _REQUESTS,
        _counter("audited_met"),
    ),
    _count("headrace_preemptions", "Preempted requests.", "preemptions", _counter("preemptions")),
    _count(
        "headrace_recomputed_tokens", "Tokens to be computed again when preempted requests resumed.", _TOKENS,
        _counter("recomputed_tokens"),
    ),
    _count("headrace_iterations", "Executed iterations.", "iterations", _counter("iterations")),
    _count("headrace_holds", "Requests released from a hold.", _REQUESTS, _counter("held")),
    _count(
        "headrace_hold_seconds", "Time for which released requests were held, summed.", "seconds", _counter("hold_s")
    ),
)
"""What an engine itself knows."""

ESTIMATES: tuple[Metric, ...] = (
    _estimate("headrace_offered_rate", "Arrivals that the controller sees.", _RATE, _at("rate_rps")),
    _estimate(
        "headrace_load_ratio", "Load (rho) of the fluid model; 1: capacity.", "ratio", _at("fluid", "load")
    ),
    _estimate(
        "headrace_capacity_rate", "Requests per second possible within the targets.", _RATE,
        _at("forecast", "capacity_rps"),
    ),
    _estimate(
        "headrace_goodput_rate", "Requests per second expected within the targets.", _RATE,
        _at("forecast", "goodput_rps"),
    ),
    _estimate(
        "headrace_bottleneck", "What limits the engine: memory, slots, token budget, a target, or nothing.", "1",
        _word("bottleneck", "forecast", "bottleneck"), "bottleneck",
    ),
    _estimate(
        "headrace_memory_tokens", "KV cache in use at the fluid equilibrium (M*).", _TOKENS,
        _at("fluid", "memory_tokens"),
    ),
    _estimate(
        "headrace_iteration_predicted_seconds", "Iteration time at the fluid equilibrium.", "seconds",
        _at("fluid", "iteration_time_s"),
    ),
    _estimate(
        "headrace_iteration_measured_seconds", "Mean of the recent iterations.", "seconds",
        _at("forecast", "iteration_s", "value"),
    ),
    _estimate(
        "headrace_target_seconds", "The targets in force.", "seconds",
        _cases("target", {name: ("targets", f"{name}_s") for name in ("ttft", "tpot", "latency")}), "target",
    ),
    _estimate(
        "headrace_time_model_seconds", "Terms of the iteration-time model: d0 of every iteration, d1 per KV token "
        "read, d2 per prefill token, d3 per decode token, floor of the compute.", "seconds, or seconds per token",
        _cases("term", {
            "d0": ("time_model", "d0_s"), "d1": ("time_model", "d1_s_per_kv_token"),
            "d2": ("time_model", "d2_s_per_prefill_token"), "d3": ("time_model", "d3_s_per_decode_token"),
            "floor": ("time_model", "floor_s"),
        }), "term",
    ),
    _estimate(
        "headrace_time_model_error_ratio", "Mean error of recent iteration times, as a share of them.", "ratio",
        _at("time_model", "mape"),
    ),
)
"""What a controller estimates of an engine."""

CONTROLLER_UP = Metric(
    name="headrace_controller_up", kind=Kind.GAUGE, source=Source.INGRESS, labels=(), unit="0 or 1",
    help="Whether the controller answers; absent where automatic tuning is off.", read=_at("controller", "alive"),
)
CONTROLLER_AGE = Metric(
    name="headrace_controller_age_seconds", kind=Kind.GAUGE, source=Source.CONTROLLER, labels=(), unit="seconds",
    help="Time since the latest control cycle ended.", read=_at("controller", "age_s"),
)
OF_CONTROLLER: tuple[Metric, ...] = (CONTROLLER_UP, CONTROLLER_AGE)
REPLICAS = Metric(
    name="headrace_replicas", kind=Kind.GAUGE, source=Source.CONTROLLER, labels=("model",), unit="engines",
    help="Engines that the controller tunes.",
)
REPLICAS_WANTED = Metric(
    name="headrace_replicas_wanted", kind=Kind.GAUGE, source=Source.CONTROLLER, labels=("model",), unit="replicas",
    help="Replicas that the offered load will need when one that is started now has come up; under another policy than "
    "fluid, engines that the present load needs.",
)
CYCLE_SECONDS = Metric(
    name="headrace_control_cycle_seconds", kind=Kind.HISTOGRAM, source=Source.CONTROLLER, labels=(), unit="seconds",
    help="One control cycle over all engines.", buckets=_SHORT_SECONDS,
)
SOLVE_SECONDS = Metric(
    name="headrace_solve_seconds", kind=Kind.HISTOGRAM, source=Source.CONTROLLER, labels=("model",), unit="seconds",
    help="Updating what is known of the engines that answered together, and solving for their thresholds.",
    buckets=_SHORT_SECONDS,
)
CHANNEL_SECONDS = Metric(
    name="headrace_channel_seconds", kind=Kind.HISTOGRAM, source=Source.CONTROLLER, labels=("model",), unit="seconds",
    help="From the controller's offer of thresholds to an engine until its answer.", buckets=_SHORT_SECONDS,
)
WAITING_SECONDS = Metric(
    name="headrace_waiting_seconds", kind=Kind.HISTOGRAM, source=Source.REPLICA, labels=OF_REQUEST, unit="seconds",
    help="Time in the engine's admission queue, of completed requests.", buckets=_SECONDS,
)
TPOT_SECONDS = Metric(
    name="headrace_tpot_seconds", kind=Kind.HISTOGRAM, source=Source.REPLICA, labels=OF_REQUEST, unit="seconds",
    help="Time per output token after the first, as it left the replica, of completed requests.",
    buckets=_TOKEN_SECONDS,
)
TTFT_SECONDS = Metric(
    name="headrace_ttft_seconds", kind=Kind.HISTOGRAM, source=Source.INGRESS, labels=OF_REQUEST, unit="seconds",
    help="From a streaming request's headers until its first token leaves the ingress.", buckets=_SECONDS,
)
REQUEST_SECONDS = Metric(
    name="headrace_http_request_seconds", kind=Kind.HISTOGRAM, source=Source.INGRESS, labels=OF_REQUEST,
    unit="seconds", help="From a completed request's headers until the end of its answer.", buckets=_SECONDS,
)
HTTP_STARTED = Metric(
    name="headrace_http_requests_started", kind=Kind.COUNTER, source=Source.INGRESS, labels=(), unit=_REQUESTS,
    help="HTTP requests for generation that reached an ingress.",
)
HTTP_REQUESTS = Metric(
    name="headrace_http_requests", kind=Kind.COUNTER, source=Source.INGRESS, unit=_REQUESTS,
    labels=("model", "tenant", "outcome", "reason"),
    help="Ended HTTP requests for generation by outcome: completed; rejected (429), with the engine's or the "
    "ingress's reason; refused (another 4xx), with its status; unavailable (503); failed (another 5xx, or an answer "
    "cut by an error event or an exception); hung_up (the client did).",
)
HTTP_IN_FLIGHT = Metric(
    name="headrace_http_requests_in_flight", kind=Kind.GAUGE, source=Source.INGRESS, labels=(), unit=_REQUESTS,
    help="HTTP requests for generation that have not ended: those started less those ended.",
)
EVENTS: tuple[Metric, ...] = (
    REPLICAS, REPLICAS_WANTED, CYCLE_SECONDS, SOLVE_SECONDS, CHANNEL_SECONDS, WAITING_SECONDS, TPOT_SECONDS,
    TTFT_SECONDS, REQUEST_SECONDS, HTTP_STARTED, HTTP_REQUESTS, HTTP_IN_FLIGHT,
)
"""What only a cluster records."""
ALL: tuple[Metric, ...] = (*ENGINE, *ESTIMATES, *OF_CONTROLLER, *EVENTS)


def samples(metrics: Iterable[Metric], state: State) -> Iterator[tuple[Metric, dict[str, str], float]]:
    """Each metric that has a value in an engine's state, with its own labels."""
    for metric in metrics:
        if metric.read is not None:
            for labels, value in metric.read(state):
                yield metric, labels, value
