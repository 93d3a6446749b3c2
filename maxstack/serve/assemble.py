"""A server's parts by the arguments of `maxstack serve`: for the verb, and for replicas that something else runs."""

import argparse
import logging
from pathlib import Path
from typing import Any

import maxstack
from maxstack.config import UserError
from maxstack.serve.engine import AsyncEngine
from maxstack.serve.http.settings import Settings
from maxstack.serve.operate.keys import keys_in
from maxstack.serve.operate.listen import checked_tls, is_loopback
from maxstack.serve.operate.management import management
from maxstack.serve.operate.operation import Operation
from maxstack.serve.operate.phases import Phases
from maxstack.serve.operate.probes import probes
from maxstack.serve.operate.records import with_texts
from maxstack.serve.operate.request_log import RequestLog
from maxstack.serve.operate.tracing import tracer
from maxstack.serve.starting import DRAFTS, Start, slow_step_s, start

log = logging.getLogger(__name__)

STDERR = 2


class Parts:
    """The operation at once, the engine when `begin` has made it. Belongs into a running event loop."""

    def __init__(self, args: argparse.Namespace, settings: Settings, phases: Phases):
        self.settings = settings
        self._start, self._finishing = start_of(args), []
        self.operation = Operation(
            self._start.model_name, phases=phases, stuck_after_s=args.stuck_after, requests=self._requests(args),
            tracer=tracer(maxstack.__version__), log_prompts=args.log_prompts,
        )  # fmt: skip
        self.operation.loading = {"dtype": args.dtype, "weights": args.weights}
        self.operation.routers += [probes(self.operation), management(self.operation)]

    def begin(self) -> AsyncEngine:
        """The engine, ready for its first request; takes its time, in any thread."""
        engine = start(self._start, self.operation.phases, self.operation.metrics)
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


def start_of(args: argparse.Namespace) -> Start:
    """What is to be served."""
    return Start(
        model=args.model, name=args.name, adapters=tuple(args.adapters), weights=args.weights, dtype=args.dtype,
        step=args.step, averaged=args.averaged, kv=args.kv, max_length=args.max_length, rows=args.rows,
        pages=args.pages, waiting=args.waiting, adapter_slots=args.adapter_slots, adapter_rank=args.adapter_rank,
        drafts=args.drafts or (DRAFTS if args.draft_model else 0), draft_model=args.draft_model,
        tensor=args.tensor,
    )  # fmt: skip


def settings_of(args: argparse.Namespace) -> Settings:
    """What the front is told."""
    keys = () if args.api_key_file is None else keys_in(args.api_key_file, "--api-key-file")
    management_key = None
    if args.management_key_file is not None:
        [management_key, *more] = keys_in(args.management_key_file, "--management-key-file")
        if more or management_key in keys:
            raise UserError(
                f"--management-key-file {args.management_key_file}: give one key there, and none of --api-key-file's"
            )
    fields: dict[str, Any] = {} if args.deadline is None else {"deadline_s": args.deadline}
    return Settings(
        model_name=start_of(args).model_name, api_keys=keys, management_key=management_key,
        cors_origins=tuple(args.cors_origin), tls=checked_tls(args.tls_cert, args.tls_key),
        local_names_only=not keys and not args.allow_no_key and is_loopback(args.host),
        chat_template=template_of(args.template), parser=args.parser, log_prompts=args.log_prompts, **fields,
    )  # fmt: skip


def template_of(name: str | None) -> str | None:
    """A template's text, or its name."""
    from maxstack.chat.command import CHATML, template_in

    return name if name in (None, CHATML) else template_in(Path(name).expanduser())
