"""An OTLP collector over gRPC that keeps the spans it receives."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any, NamedTuple

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Span(NamedTuple):
    name: str
    trace_id: str
    id: str
    parent: str
    start_s: float
    end_s: float
    attributes: dict[str, Any]
    service: str


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.endpoint = ""
        self._spans: list[Span] = []
        self._came = threading.Condition()

    @classmethod
    @contextlib.contextmanager
    def running(cls) -> Iterator[Collector]:
        """One that listens on a free port of this machine."""
        collector = cls()
        server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
        collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield collector
        finally:
            server.stop(None).wait()

    def Export(self, request: Any, context: Any) -> Any:
        """Called by exporters."""
        with self._came:
            for resource in request.resource_spans:
                service = _attributes(resource.resource).get("service.name", "")
                self._spans += [_span(one, service) for scope in resource.scope_spans for one in scope.spans]
            self._came.notify_all()
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self, trace_id: str, wanted: set[str]) -> dict[str, Span]:
        """The spans of a trace by name; empty until all wanted ones are here."""
        found = {span.name: span for span in tuple(self._spans) if span.trace_id == trace_id}
        return found if wanted <= found.keys() else {}

    def wait_for(self, count: int, timeout_s: float = 20.0) -> list[Span]:
        """All spans, once there are so many."""
        with self._came:
            assert self._came.wait_for(lambda: len(self._spans) >= count, timeout_s), self._spans
            return list(self._spans)


def _span(span: Any, service: str) -> Span:
    return Span(
        span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.start_time_unix_nano / 1e9,
        span.end_time_unix_nano / 1e9, _attributes(span), service,
    )


def _attributes(holder: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in holder.attributes}
