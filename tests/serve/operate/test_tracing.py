"""Traces: only where they are asked for, children of whoever asked, with the times of the engine."""

import asyncio
import http.server
import sys
import threading

import pytest

import tests.serve.operate.test_running as running
from maxstack.serve.operate.tracing import Tracer, tracer

sdk = pytest.importorskip("opentelemetry.sdk.trace")
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans():
    """A tracer, and what it has exported."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracer(provider), exporter.get_finished_spans


def test_a_request_is_a_span_with_its_phases_under_the_caller_s(spans):
    made, finished = spans

    async def work() -> None:
        async with running.server(tracer=made) as here:
            await here.get("/metrics")
            headers = {"traceparent": PARENT}
            await here.client.post("/v1/completions", json=running.ASKED, headers=headers)

    asyncio.run(work())
    by_name = {span.name: span for span in finished()}
    assert set(by_name) == {"POST /v1/completions", "queue", "prefill", "decode"}
    root = by_name["POST /v1/completions"]
    assert f"{root.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{root.parent.span_id:016x}" == PARENT.split("-")[2]
    assert root.attributes["gen_ai.usage.output_tokens"] == 8
    assert "a" * 8 not in str(root.attributes.values())
    parts = [by_name[name] for name in ("queue", "prefill", "decode")]
    assert all(part.parent.span_id == root.context.span_id for part in parts)
    times = [root.start_time, *(part.start_time for part in parts), parts[-1].end_time, root.end_time]
    assert times == sorted(times)
    assert parts[0].end_time == pytest.approx(parts[1].start_time, abs=1000)


def test_what_fails_is_marked_as_an_error(spans):
    made, finished = spans

    async def work() -> None:
        async with running.server(tracer=made) as here:
            here.device.fails = RuntimeError("the device is gone")
            assert (await here.ask()).status_code == 500

    asyncio.run(work())
    [root] = [span for span in finished() if span.name.startswith("POST")]
    assert root.status.status_code.name == "ERROR"


def test_a_collector_is_sent_the_spans_over_otlp(monkeypatch):
    """What stands in for it listens here, and reads what OpenTelemetry's own exporter sends."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    heard: list[tuple[str, ExportTraceServiceRequest]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            heard.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        for name in ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_SERVICE_NAME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        made = tracer("1")
        assert made is not None

        async def work() -> None:
            async with running.server(tracer=made) as here:
                await here.client.post("/v1/completions", json=running.ASKED, headers={"traceparent": PARENT})

        asyncio.run(work())  # the end of the server sends what waits
        collector.shutdown()
    assert {path for path, _ in heard} == {"/v1/traces"}
    [resource] = [one for _, request in heard for one in request.resource_spans]
    own = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert (own["service.name"], own["service.version"]) == ("maxstack", "1")
    spans = {span.name: span for scope in resource.scope_spans for span in scope.spans}
    assert {"POST /v1/completions", "queue", "prefill", "decode"} <= spans.keys()
    assert spans["POST /v1/completions"].trace_id.hex() == PARENT.split("-")[1]


def test_without_being_asked_for_or_without_the_library_there_are_none(monkeypatch, caplog):
    for name in ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert tracer("1") is None
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    made = tracer("1")
    assert made is not None
    made.close()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "nobody-has-this")
    assert tracer("1") is None
    assert "no package brings" in caplog.text
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert tracer("1") is None
