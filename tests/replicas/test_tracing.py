"""The spans of a request at an OTLP collector: one trace, from the client's own span to the last token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from collector import Collector
from opentelemetry import trace
from vllm.v1.metrics.stats import RequestStateStats

from replicas.delivery import Deliveries, noting
from replicas.tracing import OFF, Tracing
from router.outcomes import Outcomes, Watched
from scheduler.rejection import TOO_LATE, Rejection
from scheduler.request_rejected import RequestRejected, raising_rejections

TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = [(b"host", b"x"), (b"traceparent", f"00-{TRACE}-{CLIENT}-01".encode()), (b"tracestate", b"vendor=1")]
OPEN: list[Tracing] = []


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setattr(trace, "set_tracer_provider", lambda provider: None)
    with Collector.running() as collector:
        yield collector
        while OPEN:
            OPEN.pop().close()


def tracing(collector: Collector, service: str = "ingress", **options: Any) -> Tracing:
    OPEN.append(Tracing(collector.endpoint, service=service, instance="i", **options))
    return OPEN[-1]


def is_sampled(raw_request: Any) -> bool:
    """By the flags of the context that the request carries on."""
    return bool(int(raw_request.headers["traceparent"].rpartition("-")[2], 16) & 1)


def through(scope: dict[str, Any], of: Tracing) -> Any:
    """The request as its replica sees it."""
    with of.route(scope) as note, Watched(Outcomes(), {}, note) as watched:
        watched.model = "m"
        return SimpleNamespace(headers={name.decode(): value.decode() for name, value in scope["headers"]})


async def served(deliveries: Deliveries, raw_request: Any, generate: Any) -> None:
    delivery = deliveries.begin("red", raw_request)

    async def chunks() -> Any:
        try:
            async for _ in noting(generate)():
                yield "data: a"
        except RequestRejected:
            yield "an error"

    async for _ in deliveries.timed(delivery, chunks(), streamed=True):
        pass


def test_a_request_is_one_trace(collector: Collector) -> None:
    raw = through({"headers": list(HEADERS)}, tracing(collector))
    assert raw.headers["host"] == "x" and raw.headers["tracestate"] == "vendor=1"
    now_s = time.monotonic()
    times = RequestStateStats(
        num_generation_tokens=9, queued_ts=now_s - 4, scheduled_ts=now_s - 3, first_token_ts=now_s - 2.5,
        last_token_ts=now_s - 1,
    )

    async def generate() -> Any:
        yield SimpleNamespace(request_id="r", outputs=[SimpleNamespace(index=0)], metrics=times)

    asyncio.run(served(Deliveries(tracing=tracing(collector, "replica")), raw, generate))
    spans = {span.name: span for span in collector.wait_for(4)}
    assert {span.trace_id for span in spans.values()} == {TRACE}
    route = spans["route"]
    assert route.parent == CLIENT and route.service == "ingress" and route.attributes["headrace.outcome"] == "hung_up"
    assert {spans[name].parent for name in ("queue", "prefill", "decode")} == {route.id}
    took = {name: spans[name].end_s - spans[name].start_s for name in ("queue", "prefill", "decode")}
    assert took == pytest.approx({"queue": 1.0, "prefill": 0.5, "decode": 1.5}, abs=1e-3)
    assert abs(spans["decode"].end_s - (time.time() - 1)) < 5, "on the clock of the day"
    assert spans["queue"].attributes == {"headrace.decision": "admitted", "headrace.waited_s": pytest.approx(1.0)}
    assert spans["decode"].attributes == {"headrace.output_tokens": 9}


def test_a_rejected_request_has_its_decision_and_reason(collector: Collector) -> None:
    raw = through({"headers": list(HEADERS)}, tracing(collector))

    async def generate() -> Any:
        stop = Rejection(TOO_LATE, 3).as_json()
        yield SimpleNamespace(request_id="r", outputs=[
            SimpleNamespace(index=0, finish_reason="abort", stop_reason=stop)
        ])

    deliveries = Deliveries(tracing=tracing(collector, "replica"))
    asyncio.run(served(deliveries, raw, raising_rejections(generate)))
    (queue,) = [span for span in collector.wait_for(2) if span.name == "queue"]
    assert queue.trace_id == TRACE and queue.attributes["headrace.decision"] == "rejected"
    assert queue.attributes["headrace.reason"] == "too_late" and queue.attributes["headrace.waited_s"] >= 0


def test_a_request_without_a_context_begins_a_trace_and_the_ratio_decides(collector: Collector) -> None:
    none = through({"headers": []}, tracing(collector, ratio=0.0))
    every = through({"headers": []}, tracing(collector, ratio=1.0))
    (span,) = collector.wait_for(1)
    assert span.parent == "" and not is_sampled(none) and is_sampled(every)
    assert every.headers["traceparent"].startswith(f"00-{span.trace_id}-{span.id}-")


def test_what_the_client_has_decided_is_kept(collector: Collector) -> None:
    raw = through({"headers": [(b"traceparent", f"00-{TRACE}-{CLIENT}-00".encode())]}, tracing(collector))
    assert raw.headers["traceparent"].startswith(f"00-{TRACE}-") and not is_sampled(raw)


def test_off_changes_nothing_and_costs_no_exporter() -> None:
    scope = {"headers": list(HEADERS)}
    through(scope, OFF)
    assert scope["headers"] == HEADERS and OFF.context_of(SimpleNamespace(headers={})) is None

    def unwanted(endpoint: str) -> Any:
        raise AssertionError(endpoint)

    Tracing(None, service="s", instance="i", make=unwanted)


@pytest.mark.parametrize("headers", [
    [(b"traceparent", b"nonsense")], [(b"traceparent", b"\xff\xfe")], [(b"traceparent", b"00-" + b"0" * 4000)],
])
def test_a_malformed_context_begins_a_new_trace(collector: Collector, headers: Any) -> None:
    raw = through({"headers": headers}, tracing(collector))
    assert len(raw.headers["traceparent"]) == 55 and is_sampled(raw)
