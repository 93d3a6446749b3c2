"""What `maxstack serve` does with its arguments."""

import argparse
import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import Any

import psutil

from maxstack.models.compiled_cache import use_compiled_cache
from maxstack.processes import join_processes
from maxstack.serve.hosts.leader import Leader
from maxstack.serve.http.settings import Settings
from maxstack.serve.meaning import settings_of, start_of
from maxstack.serve.operate.listen import address_of, check_open, listening, url_of
from maxstack.serve.operate.phases import Phases
from maxstack.serve.starting import Loading, start

log = logging.getLogger(__name__)

DONE = 0


def run(args: argparse.Namespace) -> int:
    """Serve, or compile and leave; returns the exit code."""
    phases = Phases(log.info, before_s=max(0.0, time.time() - psutil.Process().create_time()))
    if not args.compile_only:  # what is refused is refused before others are waited for
        check_open(args.host, settings_of(args).api_keys, args.allow_no_key)
    use_compiled_cache()
    if join_processes():
        from maxstack.serve.hosts.together import run_together  # for those who are not alone

        return run_together(args, phases, partial(alone, args, phases))
    return alone(args, phases)


def alone(args: argparse.Namespace, phases: Phases, leader: Leader | None = None) -> int:
    """Serve, as the only process or as the one that leads."""
    if args.compile_only:
        start(start_of(args), phases, leader=leader).close()
        phases.finish("compiled programs are kept for the next start")
        return DONE
    settings = settings_of(args)
    with listening(args.host, args.port) as sock:
        model = Loading(start_of(args), phases)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_serve(args, phases, settings, sock, model, leader))


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The fast event loop, where there is one for this system."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _serve(
    args: argparse.Namespace, phases: Phases, settings: Settings, sock: Any, model: Loading,
    leader: Leader | None,
) -> int:  # fmt: skip
    """Serve until asked to leave."""
    # Not before: threads read the model while this one imports all that answers for it.
    from maxstack.serve.assemble import Parts
    from maxstack.serve.operate.running import Serving, serve

    parts = Parts(args, settings, phases, model, leader)
    if leader is not None:
        drain, loop = parts.operation.drain_asked, asyncio.get_running_loop()

        def leaving(why: str) -> None:
            log.info("%s: all finish what is under way", why)
            loop.call_soon_threadsafe(drain.set)

        leader.on_leaving = leaving

    @contextlib.asynccontextmanager
    async def beside(front: Any) -> AsyncGenerator[None]:
        from maxstack.serve.rpc.server import grpc_served  # for those who ask for it

        address = address_of(args.host, args.grpc_port)
        async with grpc_served(front, settings, parts.operation, address) as port:
            log.info("gRPC on %s", address_of(args.host, port))
            yield

    scheme = "http" if settings.tls is None else "https"
    log.info("listening on %s; /ready says when to ask", url_of(sock, scheme))
    serving = Serving(
        settings=settings, drain_s=args.drain_seconds, beside=None if args.grpc_port is None else beside
    )
    return await serve(parts.begin, parts.operation, sock, serving)
