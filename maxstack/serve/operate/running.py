"""From the first byte that is listened for to the last that is sent: start, serve, drain, leave."""

import asyncio
import contextlib
import logging
import os
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from socket import socket
from typing import Any, NoReturn

import uvicorn

from maxstack.config import RunError
from maxstack.serve.engine import AsyncEngine
from maxstack.serve.http.app import create_app
from maxstack.serve.http.front import Front
from maxstack.serve.http.server import server_config
from maxstack.serve.http.settings import Settings
from maxstack.serve.operate.door import Door
from maxstack.serve.operate.operation import Operation
from maxstack.serve.operate.signals import handled
from maxstack.serve.operate.status_line import StatusLine

log = logging.getLogger(__name__)

DONE, FAILED = 0, 1
CLOSE_S = 5.0
"""Seconds in which the engine has to stop; one that is stuck is left behind."""
LAST_WORDS_S = 2
"""Seconds for answers to be sent when everything is over."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a server runs."""

    settings: Settings
    drain_s: float = 30.0
    """Seconds that requests have to finish in when the server is asked to leave."""
    say: Callable[[str], None] = log.info
    leave: Callable[[int], NoReturn] = os._exit
    """Ends the process while it is still starting: the compiler waits for nobody."""
    beside: Callable[[Front], AbstractAsyncContextManager[Any]] | None = None
    """What else runs while the server does: the one for gRPC."""


class Server(uvicorn.Server):
    """uvicorn, but for the signals, which are ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


async def serve(
    begin: Callable[[], AsyncEngine], operation: Operation, listening: socket, serving: Serving
) -> int:
    """Listen at once, begin in a thread, serve until asked to leave; the exit code."""
    door, stop = Door(operation), asyncio.Event()

    def asked(name: str) -> None:
        serving.say(
            f"{name}: finishing what is under way, {serving.drain_s:.0f} s at most; once more ends it at once"
        )
        stop.set()

    config = server_config(door, serving.settings, timeout_graceful_shutdown=LAST_WORDS_S)
    server, engine = Server(config), None
    with handled(asked):
        answering = asyncio.create_task(server.serve([listening]))
        showing = asyncio.create_task(StatusLine(operation).show())
        stopping = asyncio.create_task(stop.wait())
        try:
            engine = await _begun(begin, stopping, answering)
            if engine is None:
                await _end(server, answering)
                _flush()
                serving.leave(DONE)
            async with _open(engine, operation, door, serving):
                draining = asyncio.create_task(operation.drain_asked.wait())
                await asyncio.wait({stopping, draining, answering}, return_when=asyncio.FIRST_COMPLETED)
                draining.cancel()
                if answering.done():
                    answering.result()
                    raise RunError("the HTTP server has stopped by itself")
                left = await operation.drain(serving.drain_s)
                if left:
                    serving.say(f"{left} requests were not done in {serving.drain_s:.0f} s: they are cut off")
                await close(engine)
                await _end(server, answering)
        finally:
            for task in (showing, stopping):
                task.cancel()
            await asyncio.gather(showing, stopping, return_exceptions=True)
            if engine is not None:
                await close(engine)
            await _end(server, answering)
            await asyncio.to_thread(operation.close)
    return DONE


@contextlib.asynccontextmanager
async def _open(
    engine: AsyncEngine, operation: Operation, door: Door, serving: Serving
) -> AsyncGenerator[None]:
    """The door is open: the application answers."""
    app = create_app(engine, serving.settings, operation=operation)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        if serving.beside is not None:
            await stack.enter_async_context(serving.beside(app.state.front))
        door.app = app
        operation.phases.finish(f"{operation.model} answers")
        yield


async def _begun(
    begin: Callable[[], AsyncEngine], stopping: asyncio.Task, answering: asyncio.Task
) -> AsyncEngine | None:
    """The engine, made in a thread; None if asked to leave meanwhile."""
    starting = ThreadPoolExecutor(1, thread_name_prefix="maxstack-start")
    made = asyncio.get_running_loop().run_in_executor(starting, begin)
    starting.shutdown(wait=False)
    await asyncio.wait({made, stopping, answering}, return_when=asyncio.FIRST_COMPLETED)
    if made.done():
        return made.result()
    if answering.done():
        answering.result()
        raise RunError("the HTTP server has stopped by itself")
    return None


async def close(engine: AsyncEngine, limit_s: float = CLOSE_S) -> None:
    """Stop an engine; one that is stuck is left behind."""
    closing = threading.Thread(target=engine.close, name="maxstack-close", daemon=True)
    closing.start()
    for _ in range(int(limit_s / 0.02)):
        if not closing.is_alive():
            return
        await asyncio.sleep(0.02)
    log.warning("the engine did not stop in %.0f s, and is left behind", limit_s)


async def _end(server: Server, answering: asyncio.Task) -> None:
    server.should_exit = True
    await asyncio.gather(answering, return_exceptions=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):
            stream.flush()
