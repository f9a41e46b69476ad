"""Traces by OpenTelemetry, off unless an OTLP endpoint is configured: route, then queue, prefill and decode. No Ray.

The ingress's `route` is a child of the client's W3C context (or of Serve's own span where Serve traces) and the parent
of all that follows, by the `traceparent` header that it passes on. vLLM reads the same header: its own span of the
request, `llm_request`, stands beside ours. Spans hold no prompt, no answer and no key.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

OTLP_ENDPOINT = "otlp_traces_endpoint"
"""vLLM's engine argument: where its spans, and ours of a replica, go."""
_W3C = TraceContextTextMapPropagator()
_HEADERS = (b"traceparent", b"tracestate")
_NS = 1_000_000_000
Note = Callable[[Mapping[str, str]], None]


def exporter(endpoint: str) -> SpanExporter:
    """OTLP over gRPC, as vLLM's own; with TLS for an https:// address."""
    found: SpanExporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    return found


class Tracing:
    """The spans of one process. endpoint: None: off.

    service: its name; instance: the replica. ratio: share of the requests that are traced, where the client has not
    decided it. make: the exporter of an endpoint.
    """

    def __init__(
        self, endpoint: str | None, *, service: str, instance: str, ratio: float = 1.0,
        make: Callable[[str], SpanExporter] = exporter,
    ) -> None:
        self._tracer: trace.Tracer | None = None
        self._provider: TracerProvider | None = None
        if not endpoint:
            return
        self._provider = provider = TracerProvider(
            resource=Resource.create({"service.name": service, "service.instance.id": instance}),
            sampler=ParentBasedTraceIdRatio(ratio),
        )
        provider.add_span_processor(BatchSpanProcessor(make(endpoint)))
        if not isinstance(trace.get_tracer_provider(), TracerProvider):  # vLLM's spans go by it too
            trace.set_tracer_provider(provider)
        self._tracer = provider.get_tracer("headrace")

    def close(self) -> None:
        """Send what is left; a process does so by itself when it ends."""
        if self._provider is not None:
            self._provider.shutdown()

    @contextlib.contextmanager
    def route(self, scope: dict[str, Any]) -> Iterator[Note]:
        """The span of a request in the ingress; the request goes on under it. Yields what adds attributes at its end.

        scope: of ASGI; its `traceparent` becomes that of the span.
        """
        if self._tracer is None:
            yield lambda attributes: None
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        around = trace.get_current_span().get_span_context().is_valid
        with self._tracer.start_as_current_span(
            "route", context=None if around else _W3C.extract(headers), kind=SpanKind.SERVER, record_exception=False,
            set_status_on_exception=False,
        ) as span:
            own: dict[str, str] = {}
            _W3C.inject(own)
            others = [(name, value) for name, value in scope["headers"] if name not in _HEADERS]
            scope["headers"] = others + [(name.encode(), value.encode()) for name, value in own.items()]
            yield lambda attributes: span.set_attributes({f"headrace.{key}": of for key, of in attributes.items()})

    def context_of(self, raw_request: Any) -> Any:
        """The context that a request brings to its replica; None: it is not traced."""
        return _W3C.extract(getattr(raw_request, "headers", None) or {}) if self._tracer is not None else None

    def rejected(self, context: Any, since_s: float, reason: str) -> None:
        """The `queue` span of a request that is rejected now. since_s: its arrival, on the monotonic clock."""
        now_s = time.monotonic()
        self._span("queue", context, since_s, now_s, decision="rejected", reason=reason, waited_s=now_s - since_s)

    def served(self, context: Any, times: Any) -> None:
        """`queue`, `prefill` and `decode` of a completed request. times: vLLM's `RequestStateStats`."""
        waited_s = max(0.0, times.scheduled_ts - times.queued_ts)
        self._span("queue", context, times.queued_ts, times.scheduled_ts, decision="admitted", waited_s=waited_s)
        self._span("prefill", context, times.scheduled_ts, times.first_token_ts)
        tokens = times.num_generation_tokens
        self._span("decode", context, times.first_token_ts, times.last_token_ts, output_tokens=tokens)

    def _span(self, name: str, context: Any, from_s: float, to_s: float, **attributes: str | float) -> None:
        """A span between two seconds of the monotonic clock, which all processes of a machine share."""
        if self._tracer is None:
            return
        to_unix_s = time.time() - time.monotonic()
        span = self._tracer.start_span(
            name, context=context, start_time=round((to_unix_s + from_s) * _NS),
            attributes={f"headrace.{key}": of for key, of in attributes.items()},
        )
        span.end(round((to_unix_s + max(from_s, to_s)) * _NS))


OFF = Tracing(None, service="", instance="")
"""Nothing is traced."""
