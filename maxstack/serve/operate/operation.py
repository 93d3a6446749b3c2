"""The server as whoever runs it sees it: is it up, may it be asked, what does it do, when does it leave."""

import asyncio
import contextlib
import contextvars
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

import maxstack
from maxstack.serve.engine import AsyncEngine, Stream
from maxstack.serve.http.errors import ApiError
from maxstack.serve.http.operation import Seen
from maxstack.serve.operate.metrics import PREFIX, Metrics
from maxstack.serve.operate.phases import Phases
from maxstack.serve.operate.records import record_of, trace_of
from maxstack.serve.operate.request_log import RequestLog
from maxstack.serve.operate.tracing import Tracer
from maxstack.serve.operate.watchdog import LIMIT_S, Watchdog

log = logging.getLogger(__name__)

WORK = "/v1/"
"""Under it lies what begins work, but for the list of models."""
RETRY_S = 5
ROUTES = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/models", "/tokenize",
    "/detokenize", "/tokenizer_info", "/maxstack.v1.Maxstack", "/health", "/ready", "/metrics", "/version",
    "/manage", "/",
)  # fmt: skip
"""What the metrics tell apart; anything else is "other"."""
_current: contextvars.ContextVar["Asked | None"] = contextvars.ContextVar("asked", default=None)


@dataclass
class Asked:
    """A request that is under way, and the engine's streams for it."""

    seen: Seen
    streams: list[Stream] = field(default_factory=list)


class Operation:
    """Satisfies `http.operation.Operation` and `engine.Observer`. Lives in one event loop."""

    def __init__(
        self, model: str, *, phases: Phases | None = None, stuck_after_s: int | float | None = None,
        requests: RequestLog | None = None, tracer: Tracer | None = None, log_prompts: bool = False,
    ):  # fmt: skip
        self.model, self.phases = model, phases or Phases()
        self.metrics = Metrics(model, self._own_metrics)
        self.routers: list[APIRouter] = []
        self.engine: AsyncEngine | None = None
        self.watchdog: Watchdog | None = None
        self.draining = False
        self.drain_asked = asyncio.Event()
        self._under_way: dict[int, Asked] = {}
        self._idle = asyncio.Event()
        self._stuck_after_s, self._requests, self._tracer = stuck_after_s, requests, tracer
        self._log_prompts = log_prompts
        self.loading: dict[str, Any] = {}
        """How models are read, for weights that come later."""

    def attach(self, engine: AsyncEngine, slow_step_s: int | float = 0.0) -> None:
        """The engine is there; no step of it should take longer than `slow_step_s`."""
        self.engine = self.metrics.engine = engine
        told = self._stuck_after_s
        self.watchdog = Watchdog(engine, limit_s=max(LIMIT_S, slow_step_s) if told is None else told)
        engine.observer = self

    # ------------------------------------------------------------------------------------------- what is asked of us
    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether the process does its work, or is about to; if not it should be started anew."""
        if self.watchdog is None:
            return True, {"status": "starting", "phase": self.phases.text()}
        if (fault := self.watchdog.fault) is not None:
            return False, {"status": fault[0], "reason": fault[1]}
        return True, {"status": "draining" if self.draining else "ok"}

    def ready(self) -> tuple[bool, dict[str, Any]]:
        """Whether requests should be sent here."""
        well, told = self.health()
        if well and self.phases.ready and not self.draining:
            return True, {"status": "ready"}
        return False, told

    def version(self) -> dict[str, Any]:
        """What runs here."""
        return {
            "version": maxstack.__version__,
            "model": self.model,
            "instance": f"{socket.gethostname()}:{os.getpid()}",
        }

    def refusal(self, path: str) -> ApiError | None:
        """Why new work is not taken now; None while it is."""
        if not path.startswith(WORK) or path.startswith("/v1/models"):
            return None
        if self.draining:
            return _unavailable("the server is shutting down: ask another one, or again later", "draining")
        if self.watchdog is not None and (fault := self.watchdog.fault) is not None:
            return _unavailable(f"the engine is {fault[0]}: {fault[1]}", f"engine_{fault[0]}")
        return None

    # ------------------------------------------------------------------------------------------- what we are told
    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """While the application runs, the watchdog looks."""
        watching = asyncio.create_task(self.watchdog.watch()) if self.watchdog is not None else None
        try:
            yield
        finally:
            if watching is not None:
                watching.cancel()

    def began(self, seen: Seen) -> None:
        """A request has come."""
        asked = Asked(seen)
        self._under_way[id(seen)] = asked
        self._idle.clear()
        _current.set(asked)

    def ended(self, seen: Seen) -> None:
        """It is over."""
        asked = self._under_way.pop(id(seen), None)
        if not self._under_way:
            self._idle.set()
        path = route_of(seen.path)
        ended = seen.ended or time.monotonic()
        self.metrics.http_requests.labels(path, _method(seen.method), str(seen.status)).inc()
        self.metrics.http_seconds.labels(path).observe(ended - seen.arrived)
        if asked is None or (
            not asked.streams and path in ("/health", "/ready", "/metrics") and seen.status < 400
        ):
            return
        if self._requests is not None:
            self._requests.write(record_of(seen, asked.streams, prompts=self._log_prompts))
        if self._tracer is not None:
            self._tracer.request(*trace_of(seen, asked.streams, self.model))

    def opened(self, stream: Stream) -> None:
        """The engine was asked, on behalf of the request whose context this is."""
        asked = _current.get()
        if asked is not None:
            asked.streams.append(stream)

    # ------------------------------------------------------------------------------------------------- the end
    @property
    def under_way(self) -> int:
        """Requests that are not over."""
        return len(self._under_way)

    async def drain(self, limit_s: float) -> int:
        """Take nothing more, and wait for what is under way; how many were not over in time."""
        self.draining = True
        self.drain_asked.set()
        if self._under_way:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), limit_s)
        return len(self._under_way)

    def close(self) -> None:
        """Write what waits to be written."""
        if self._requests is not None:
            self._requests.close()
        if self._tracer is not None:
            self._tracer.close()

    def _own_metrics(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(
            f"{PREFIX}startup_seconds", "Of each phase of the start.", labels=("phase",)
        )
        for phase, seconds in list(self.phases.seconds.items()):
            family.add_metric((phase,), seconds)
        yield family
        yield GaugeMetricFamily(f"{PREFIX}healthy", "As /health has it.", value=int(self.health()[0]))
        yield GaugeMetricFamily(f"{PREFIX}ready", "As /ready has it.", value=int(self.ready()[0]))
        yield GaugeMetricFamily(
            f"{PREFIX}draining", "Whether the server is about to end.", value=int(self.draining)
        )
        if self.watchdog is not None:
            what = "Since the engine got a step done, while it has work."
            yield GaugeMetricFamily(f"{PREFIX}engine_stalled_seconds", what, value=self.watchdog.stalled_s)
        if self._requests is not None:
            what, lines = "Lines of the request log that could not be written.", self._requests.dropped
            yield CounterMetricFamily(f"{PREFIX}log_lines_dropped", what, value=lines)
        build = InfoMetricFamily(f"{PREFIX}build", "What runs here.")
        build.add_metric((), {"version": maxstack.__version__, "model_name": self.model})
        yield build


def route_of(path: str) -> str:
    """The route that a path is counted under: few, whatever is asked for."""
    if path in ROUTES:
        return path
    return next((route for route in ROUTES[:-1] if path.startswith(route + "/")), "other")


def _method(method: str) -> str:
    return method if method in ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "GRPC") else "other"


def _unavailable(message: str, code: str) -> ApiError:
    return ApiError(503, message, code=code, headers={"Retry-After": str(RETRY_S)})
