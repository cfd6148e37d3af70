"""OpenTelemetry spans, a span for each request, where the environment names a collector; else none, at no cost."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from tasks.contracts.errors import ServiceError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
_EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"  # no dependency of Goldgate


class Tracing:
    """Spans of one gateway, written by one provider.

    Args:
        provider: what they go to.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("goldgate.gateway")
        self._words = TraceContextTextMapPropagator()

    def begin(self, path: str, headers: list[tuple[bytes, bytes]]) -> Span:
        """The span of a request: within that of the client, if it says one."""
        from opentelemetry.trace import SpanKind

        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in headers
            if name in (b"traceparent", b"tracestate")
        }
        return self._tracer.start_span(
            f"POST {path}", context=self._words.extract(carrier), kind=SpanKind.SERVER, attributes={"http.route": path}
        )

    def headers(self, span: Span) -> dict[str, str]:
        """What to send to the engine, so that its spans are within ours."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._words.inject(carrier, set_span_in_context(span))
        return carrier

    def end(self, span: Span, *, name: str, version: str, status: int, waited: float, error: str) -> None:
        """Close a request's span with what came of it."""
        from opentelemetry.trace import StatusCode

        span.set_attributes(
            {
                "goldgate.name": name,
                "goldgate.version": version,
                "goldgate.waited_seconds": waited,
                "http.response.status_code": status,
            }
        )
        if error:
            span.set_status(StatusCode.ERROR, error)
        span.end()

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()


def open_tracing(environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """Spans to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names; None where it names none.

    Raises:
        ServiceError: one is named, and the exporter is not installed.
    """
    endpoint = environment.get(ENDPOINT)
    if not endpoint:
        return None
    try:
        exporter = import_module(_EXPORTER).OTLPSpanExporter()
    except ImportError as error:
        raise ServiceError(
            "A collector for traces is named, and the package that speaks to it is not installed.",
            where=f"{ENDPOINT}={endpoint}",
            fix=f"pip install opentelemetry-exporter-otlp-proto-http, or unset {ENDPOINT}",
        ) from error
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "goldgate-gateway"}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)
