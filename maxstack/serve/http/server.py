"""How uvicorn runs the application."""

import asyncio
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from maxstack.serve.http.settings import Settings
from maxstack.serve.http.wire import EXTENSION


def server_config(
    app: ASGIApp, settings: Settings, *, host: str = "127.0.0.1", port: int = 8000, **options: Any
) -> uvicorn.Config:
    """Its settings: limits of headers where they are read, no log of its own, no header that says what runs here."""
    if settings.tls is not None:
        options |= dict(zip(("ssl_certfile", "ssl_keyfile"), settings.tls, strict=True))
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=type("Impatient", (Impatient,), {"header_s": settings.header_s, "stall_s": settings.send_s}),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=settings.header_bytes,
        timeout_keep_alive=75,
        backlog=2048,
        **options,
    )


class Impatient(H11Protocol):
    """One connection: closed when headers take too long to come, or answers to be taken. uvicorn waits for ever."""

    header_s, stall_s = 15.0, 60.0
    _stalled: asyncio.TimerHandle | None = None
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client is there. Its transport may be uvloop's, which is no asyncio.Transport."""
        super().connection_made(transport)
        self._wait_for_headers()

    def data_received(self, data: bytes) -> None:
        """Something has come of it."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._patience is None:  # part of another request's headers
            self._wait_for_headers()

    def handle_events(self) -> None:
        """A request has come, maybe: its answer may take the short way."""
        super().handle_events()
        cycle = self.cycle
        if cycle is not None and cycle.scope["http_version"] == "1.1" and cycle.scope["method"] == "POST":
            extensions: dict[str, Any] = cycle.scope.setdefault("extensions", {})
            if EXTENSION not in extensions:
                extensions[EXTENSION] = Chunks(cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        self._stop_waiting()
        self._taken()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client takes less than there is."""
        super().pause_writing()
        self._taken()
        # Not closed, which would wait for the client to take the rest.
        self._stalled = self.loop.call_later(self.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It takes again."""
        self._taken()
        super().resume_writing()

    def _taken(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _wait_for_headers(self) -> None:
        self._patience = self.loop.call_later(self.header_s, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


class Chunks:
    """Writes chunks of a body to the socket past h11, which takes much longer (`benchmarks/serve_http.py`), and whose
    state they leave as it is: what begins and ends the body still goes through it."""

    def __init__(self, cycle: RequestResponseCycle):
        self._cycle = cycle

    @property
    def free(self) -> bool:
        """Whether the client takes what comes."""
        return not self._cycle.flow.write_paused

    def write(self, data: bytes) -> None:
        """One chunk; nothing where the client has left."""
        if data and not self._cycle.disconnected:
            self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
