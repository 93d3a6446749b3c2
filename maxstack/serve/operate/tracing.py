"""OpenTelemetry traces of requests: a span for each, and within it the waiting, the reading, the writing.

They are made where the library is installed and OTEL_* variables ask for them; otherwise this costs nothing.
"""

import importlib.metadata
import importlib.util
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

ASKING = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER")
EXPORTERS = "opentelemetry_traces_exporter"
"""The entry points by which packages of exporters are found."""
PROTOCOLS = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}


class Tracer:
    """Makes the spans of requests that are over: nothing is held open meanwhile."""

    def __init__(self, provider: Any):
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace, self._provider = trace, provider
        self._tracer = provider.get_tracer("maxstack")
        self._propagator = TraceContextTextMapPropagator()

    def request(
        self, name: str, began: float, ended: float, attributes: Mapping[str, Any], headers: Mapping[str, str],
        parts: list[tuple[str, float, float, Mapping[str, Any]]], error: str | None = None,
    ) -> None:  # fmt: skip
        """A request, with its parts (name, begin, end, attributes); times are those of `time.monotonic`. `headers` may
        have the traceparent of whoever asked."""
        now_ns, now = time.time_ns(), time.monotonic()

        def ns(at: float) -> int:
            return now_ns - int((now - at) * 1e9)

        kinds = self._trace.SpanKind
        parent = self._propagator.extract(dict(headers))
        span = self._tracer.start_span(
            name, parent, kinds.SERVER, attributes=_given(attributes), start_time=ns(began)
        )
        within = self._trace.set_span_in_context(span, parent)
        for part, start, end, own in parts:
            child = self._tracer.start_span(part, within, attributes=_given(own), start_time=ns(start))
            child.end(ns(max(start, end)))
        if error is not None:
            span.set_status(self._trace.StatusCode.ERROR, error)
        span.end(ns(ended))

    def close(self) -> None:
        """Send what waits."""
        self._provider.shutdown()


def _given(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None and value != ""}


def tracer(version: str) -> Tracer | None:
    """The tracer that the environment asks for; None where it asks for none, or the library is missing."""
    wanted = os.environ.get("OTEL_TRACES_EXPORTER", "").strip()
    asked = any(os.environ.get(name) for name in ASKING) and wanted != "none"
    if not asked or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if (
        importlib.util.find_spec("opentelemetry") is None
        or importlib.util.find_spec("opentelemetry.sdk") is None
    ):
        log.warning("OTEL_* asks for traces, and opentelemetry-sdk is not installed: there are none")
        return None
    exporters = [each for each in map(_exporter, (wanted or "otlp").split(",")) if each is not None]
    if not exporters:
        return None
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before ours.
    own = {"service.name": "maxstack", "service.version": version}
    if os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    ):
        del own["service.name"]
    provider = TracerProvider(resource=Resource.create(own), shutdown_on_exit=False)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracer(provider)


def _exporter(name: str) -> Any:
    """An exporter by the name that OTEL_TRACES_EXPORTER has for it."""
    name = name.strip()
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if name == "otlp":
        protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get(
            "OTEL_EXPORTER_OTLP_PROTOCOL"
        )
        name = PROTOCOLS.get(protocol or "http/protobuf", name)
    found = list(importlib.metadata.entry_points(group=EXPORTERS, name=name))
    if not found:
        what = "OTEL_* asks for the exporter %s, which no package brings: install opentelemetry-exporter-otlp"
        log.warning(what, name)
        return None
    return found[0].load()()
