"""Server-sent events, to a client that may leave at any time."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from maxstack.serve.http.errors import ApiError, ClientGone, error_of
from maxstack.serve.http.operation import Seen
from maxstack.serve.http.wire import Wire, wire_of

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
spelled = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
"""As JSON. One encoder for all: `json.dumps` makes one a call where it is told how to spell."""


def event(data: Any, name: str | None = None) -> bytes:
    """One event."""
    text = spelled(data)
    return f"event: {name}\ndata: {text}\n\n".encode() if name else f"data: {text}\n\n".encode()


class Frame:
    """Events that differ in a few values alone: all the rest is spelled once, not once a token."""

    def __init__(self, data: Any, *holes: str, name: str | None = None):
        """`holes` are values in `data`, in their order, in whose place others come."""
        rest, self._parts = event(data, name).decode(), []
        for hole in holes:
            part, _, rest = rest.partition(spelled(hole))
            self._parts.append(part)
        self._last = rest

    def __call__(self, *values: str | int) -> bytes:
        """The event with these values."""
        texts = [part + spelled(value) for part, value in zip(self._parts, values, strict=True)]
        return ("".join(texts) + self._last).encode()


def error_event(error: ApiError) -> bytes:
    """An error in the middle of a stream, which it ends."""
    return event(error.body, "error") + DONE


async def gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Events as they come. However it ends, `events` is closed, which ends what it waits for."""

    media_type = "text/event-stream"

    def __init__(
        self, first: asyncio.Future[bytes], events: AsyncGenerator[bytes], seen: Seen, keep_alive_s: float,
        told: Callable[[ApiError], bytes],
    ):  # fmt: skip
        """`first` is the first of the events, which others follow; `told` makes an event of an error."""
        super().__init__()
        self._told = told
        self._first, self._events, self._seen, self._keep_alive_s = first, events, seen, keep_alive_s
        self._sent = 0.0
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        sending = asyncio.ensure_future(self._send(send, wire_of(scope)))
        others = {asyncio.ensure_future(gone(receive)), asyncio.ensure_future(self._pulse(send))}
        try:
            await asyncio.wait({sending, *others}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, self._first, *others):
                task.cancel()
            await asyncio.gather(sending, self._first, *others, return_exceptions=True)
            await self._events.aclose()
        error = None if sending.cancelled() else sending.exception()
        if sending.cancelled() or isinstance(error, ClientGone):
            self._seen.status, self._seen.error = 499, "client_closed_request"
        elif error is not None:
            await send({"type": "http.response.body", "body": self._failed(error), "more_body": False})

    async def _send(self, send: Send, wire: Wire | None) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": await self._first, "more_body": True})
        async for chunk in self._events:
            if wire is not None and wire.free:
                wire.write(chunk)
            else:  # which waits for the client to take what there is
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self._sent = time.monotonic()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pulse(self, send: Send) -> None:
        """Comments while nothing is sent, so that nobody in between takes the stream for dead."""
        self._sent = time.monotonic()
        while True:
            idle = time.monotonic() - self._sent
            if idle >= self._keep_alive_s:
                await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                self._sent, idle = time.monotonic(), 0.0
            await asyncio.sleep(self._keep_alive_s - idle)

    def _failed(self, error: BaseException) -> bytes:
        told = error_of(error)
        self._seen.error = told.code or told.body["error"]["type"]
        if told.code == "internal_error":
            log.error("a stream has failed", exc_info=error)
        return self._told(told)
