"""A server's parts by the arguments of `maxstack serve`: for the verb, and for replicas that something else runs."""

import argparse
import gc
import logging
from pathlib import Path
from typing import Any

import maxstack
from maxstack.serve.engine import AsyncEngine
from maxstack.serve.hosts.leader import Leader
from maxstack.serve.http.settings import Settings
from maxstack.serve.meaning import start_of
from maxstack.serve.operate.management import management
from maxstack.serve.operate.operation import Operation
from maxstack.serve.operate.phases import Phases
from maxstack.serve.operate.probes import probes
from maxstack.serve.operate.records import with_texts
from maxstack.serve.operate.request_log import RequestLog
from maxstack.serve.operate.tracing import tracer
from maxstack.serve.starting import Loading, slow_step_s, start

log = logging.getLogger(__name__)

STDERR = 2


class Parts:
    """The operation at once, the engine when `begin` has made it. Belongs into a running event loop."""

    def __init__(
        self, args: argparse.Namespace, settings: Settings, phases: Phases, loading: Loading | None = None,
        leader: Leader | None = None,
    ):  # fmt: skip
        """`loading`: the model is being read already. `leader`: other processes follow."""
        self.settings, self._loading, self._leader = settings, loading, leader
        self._start, self._finishing = start_of(args), []
        self.operation = Operation(
            self._start.model_name, phases=phases, stuck_after_s=args.stuck_after, requests=self._requests(args),
            tracer=tracer(maxstack.__version__), log_prompts=args.log_prompts,
        )  # fmt: skip
        self.operation.loading = {"dtype": args.dtype, "weights": args.weights}
        self.operation.routers += [probes(self.operation), management(self.operation)]

    def begin(self) -> AsyncEngine:
        """The engine, ready for its first request; takes its time, in any thread."""
        engine = start(
            self._start, self.operation.phases, self.operation.metrics, self._loading, self._leader
        )
        self._loading = None
        gc.freeze()  # what is there now stays: no request waits for it to be looked through
        gc.enable()
        self._finishing.append(with_texts(engine.tokenizer))
        self.operation.attach(engine, slow_step_s(engine))
        return engine

    def _requests(self, args: argparse.Namespace) -> RequestLog | None:
        if args.log_file is None:
            return None

        def finish(record: dict[str, Any]) -> dict[str, Any]:
            return self._finishing[0](record) if self._finishing else record

        place = STDERR if args.log_file == "-" else Path(args.log_file)
        rotate = (args.log_rotate_mb or 0) * 2**20
        return RequestLog(place, args.log_format, rotate_bytes=rotate, finish=finish)
