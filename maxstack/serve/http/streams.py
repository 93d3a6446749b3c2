"""Between the engine's streams and a client that may leave at any time."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request

from maxstack.serve.engine import AsyncEngine
from maxstack.serve.http.errors import ApiError, ClientGone
from maxstack.serve.http.operation import Seen
from maxstack.serve.http.settings import Settings
from maxstack.serve.http.sse import EventStream, error_event, gone
from maxstack.serve.output import Delta, Output
from maxstack.serve.stream import Stream

HOLD_S = 5.0
"""Seconds for which a stream's first byte waits for its first token: until then an error still has a status."""


@contextmanager
def closing(engine: AsyncEngine, streams: list[Stream], *, on_error: bool = False) -> Iterator[None]:
    """End the streams at the end, or only if there is an error."""
    done = False
    try:
        yield
        done = True
    finally:
        if not (done and on_error):
            for stream in streams:
                engine.abort(stream.id)


async def while_connected[T](request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled at once when the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def event_stream(
    request: Request, events: AsyncGenerator[bytes], seen: Seen, settings: Settings,
    told: Callable[[ApiError], bytes] = error_event,
) -> EventStream:  # fmt: skip
    """A response that streams, once its first event is there: what fails before has a status of its own."""
    first = asyncio.ensure_future(anext(events))
    leaving = asyncio.ensure_future(gone(request.receive))
    kept = False
    try:
        await asyncio.wait({first, leaving}, timeout=HOLD_S, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done() and not first.done():
            raise ClientGone
        if first.done():
            first.result()
        kept = True
        return EventStream(first, events, seen, settings.keep_alive_s, told)
    finally:
        leaving.cancel()
        if not kept:
            first.cancel()
        await asyncio.gather(leaving, *([] if kept else [first]), return_exceptions=True)
        if not kept:
            await events.aclose()


async def merged(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, Delta]]:
    """What comes of several streams, with the number of its stream, until all are done."""
    if len(streams) == 1:  # without a task a piece
        while True:
            delta = await streams[0].next()
            yield 0, delta
            if delta.finish_reason is not None:
                return
    tasks = {asyncio.ensure_future(stream.next()): i for i, stream in enumerate(streams)}
    try:
        while tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=tasks.__getitem__):
                i, delta = tasks.pop(task), task.result()
                if delta.finish_reason is None:
                    tasks[asyncio.ensure_future(streams[i].next())] = i
                yield i, delta
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def wholes(streams: Sequence[Stream]) -> list[Output]:
    """The whole answers; the first failure is raised as soon as it is there."""
    # Not one after the other: the failure of the last would wait for all.
    return list(await asyncio.gather(*(stream.whole() for stream in streams)))


def best(outputs: Sequence[Output], n: int) -> list[Output]:
    """The n likeliest answers, by the sum of their tokens' log-probabilities."""
    return sorted(outputs, key=lambda output: -(output.cumulative_logprob or 0.0))[:n]
