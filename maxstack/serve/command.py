"""`maxstack serve --model M`: a model behind OpenAI's interface, watched, and ended in good order."""

import argparse
import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import maxstack
from maxstack.config import UserError
from maxstack.kernels.quantized_matmul import KINDS
from maxstack.models.compiled_cache import use_compiled_cache
from maxstack.serve.http.front import Front
from maxstack.serve.http.settings import Settings
from maxstack.serve.operate.keys import keys_in
from maxstack.serve.operate.listen import address_of, check_open, listening, url_of
from maxstack.serve.operate.management import management
from maxstack.serve.operate.operation import Operation
from maxstack.serve.operate.phases import Phases
from maxstack.serve.operate.probes import probes
from maxstack.serve.operate.records import with_texts
from maxstack.serve.operate.request_log import RequestLog
from maxstack.serve.operate.running import Serving, serve
from maxstack.serve.operate.tracing import tracer
from maxstack.serve.rpc.server import grpc_served
from maxstack.serve.starting import Start, start

log = logging.getLogger(__name__)

DONE = 0
KV = {"int8": "int8", "int4": "int4", "bfloat16": "bfloat16", "float32": "float32"}
STDERR = 2


def parser() -> argparse.ArgumentParser:
    """The verb's arguments."""
    result = argparse.ArgumentParser(
        prog="maxstack serve",
        description="Serve a model to OpenAI's clients: /v1/chat/completions, /v1/completions, /v1/models and more; a "
        "page to chat at /; /health, /ready and /metrics for whoever watches. The server answers /health at once, and "
        "/ready when every program is compiled: no request waits for a compilation.",
        epilog="Ctrl-C or SIGTERM: what is under way is finished, new requests get 503, then the exit code is 0; a "
        "second one ends it at once. OTEL_EXPORTER_OTLP_ENDPOINT switches traces on (opentelemetry-sdk and an exporter "
        "must be installed).",
    )
    _model(result.add_argument_group("model"))
    _sizes(result.add_argument_group("sizes"))
    _network(result.add_argument_group("who may ask, and where"))
    _watching(result.add_argument_group("logs and life"))
    return result


def _model(group: Any) -> None:
    add = group.add_argument
    add(
        "--model", required=True, metavar="M",
        help="run folder, model folder, GGUF file, hf:owner/name, or a packaged model",
    )  # fmt: skip
    add("--name", metavar="NAME", help="the name that clients ask for (default: the last part of M)")
    add("--adapters", nargs="+", default=[], metavar="NAME=FOLDER", type=adapter_of,
        help="LoRA adapters (PEFT folders); clients choose one as their model")  # fmt: skip
    add("--adapter-slots", type=positive, metavar="N",
        help="room for so many adapters at once (default: as many as --adapters has; none without any)")  # fmt: skip
    add(
        "--adapter-rank",
        type=positive,
        metavar="R",
        help="the highest rank there is room for (default: theirs)",
    )
    add("--drafts", type=positive, metavar="K",
        help="guess K tokens a step from what a request has said, while it pays; answers stay the same")  # fmt: skip
    add("--draft-model", metavar="M",
        help="a small model with the same tokens that guesses instead (with it K is 4 by default)")  # fmt: skip
    add(
        "--weights",
        choices=KINDS,
        help="hold the weights of linear layers in few bits (default: as they are)",
    )
    add("--dtype", choices=("bfloat16", "float32"), help="compute type (default: what suits the machine)")
    add("--template", metavar="FILE", help="a chat template instead of the model's: a jinja file, or chatml")
    add(
        "--parser", metavar="NAME", help="how tool calls and reasoning are spelled (default: by the template)"
    )
    add("--step", type=int, help="checkpoint step of a run (default: the newest)")
    add("--averaged", action="store_true", help="the moving average of a run's weights")


def _sizes(group: Any) -> None:
    add = group.add_argument
    add(
        "--kv", choices=tuple(KV), help="type of the cache's numbers; int8 holds twice the tokens of bfloat16"
    )
    add("--max-length", type=positive, metavar="N", help="tokens of prompt and answer together, at most")
    add("--rows", type=positive, metavar="N", help="requests worked on at once")
    add("--pages", type=positive, metavar="N", help="pages of the cache (default: what fits)")
    add("--waiting", type=positive, metavar="N", help="requests that may wait; more get 429 (default 256)")
    add("--compile-only", action="store_true",
        help="fill the cache of compiled programs, so that the next start is fast, and leave")  # fmt: skip


def _network(group: Any) -> None:
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine alone)")
    add("--port", type=port_of, default=8000, help="0 for any that is free (default %(default)s)")
    add("--grpc-port", type=port_of, metavar="PORT", help="also serve gRPC there (default: not)")
    add("--api-key-file", type=Path, metavar="FILE", help="keys, one a line; without any, everybody may ask")
    add("--management-key-file", type=Path, metavar="FILE",
        help="the key of /manage/… (adapters, weights, drain, profile), which are off without it")  # fmt: skip
    add("--allow-no-key", action="store_true", help="answer other machines although there is no key")
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="URL",
        help="web pages that may ask; again for more",
    )


def _watching(group: Any) -> None:
    add = group.add_argument
    add("--log-file", metavar="FILE", help='one line a request there; "-" for standard error (default: none)')
    add("--log-format", choices=("json", "text"), default="json", help="of those lines (default %(default)s)")
    add(
        "--log-rotate-mb",
        type=positive,
        default=None,
        metavar="MB",
        help="put the file aside at this size, keep 5",
    )
    add("--log-prompts", action="store_true", help="prompts and answers too (default: sizes and times alone)")
    add("--drain-seconds", type=seconds, default=30.0, metavar="S",
        help="for requests to finish in when the server is asked to leave (default %(default)s)")  # fmt: skip
    add("--stuck-after", type=seconds, default=60.0, metavar="S",
        help="a step that takes this long is called stuck, and /health is 503 (default %(default)s; ten times the "
        "slowest step so far, if that is more)")  # fmt: skip
    add("--deadline", type=seconds, default=None, metavar="S", help="end every request after this long")


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit code."""
    args = parser().parse_args(argv)
    begin = Start(
        model=args.model, name=args.name, adapters=tuple(args.adapters), weights=args.weights, dtype=args.dtype,
        step=args.step, averaged=args.averaged, kv=args.kv, max_length=args.max_length, rows=args.rows,
        pages=args.pages, waiting=args.waiting, adapter_slots=args.adapter_slots, adapter_rank=args.adapter_rank,
        drafts=args.drafts, draft_model=args.draft_model,
    )  # fmt: skip
    phases = Phases(log.info)
    if args.compile_only:
        use_compiled_cache()
        start(begin, phases).close()
        phases.finish("compiled programs are kept for the next start")
        return DONE
    settings = settings_of(args, begin.model_name)
    check_open(args.host, settings.api_keys, args.allow_no_key)
    use_compiled_cache()
    with listening(args.host, args.port) as sock:
        return asyncio.run(_serve(args, begin, phases, settings, sock))


async def _serve(
    args: argparse.Namespace, begin: Start, phases: Phases, settings: Settings, sock: Any
) -> int:
    """Serve until asked to leave."""
    finishing: list[Callable] = []
    requests = None
    if args.log_file is not None:
        requests = RequestLog(
            STDERR if args.log_file == "-" else Path(args.log_file), args.log_format,
            rotate_bytes=(args.log_rotate_mb or 0) * 2**20,
            finish=lambda record: finishing[0](record) if finishing else record,
        )  # fmt: skip
    operation = Operation(
        begin.model_name, phases=phases, stuck_after_s=args.stuck_after, requests=requests,
        tracer=tracer(maxstack.__version__), log_prompts=args.log_prompts,
    )  # fmt: skip
    operation.loading = {"dtype": args.dtype, "weights": args.weights}
    operation.routers += [probes(operation), management(operation)]

    def begun():
        engine = start(begin, phases, operation.metrics)
        finishing.append(with_texts(engine.tokenizer))
        operation.attach(engine)
        return engine

    @contextlib.asynccontextmanager
    async def beside(front: Front) -> AsyncGenerator[None]:
        async with grpc_served(front, settings, operation, address_of(args.host, args.grpc_port)) as port:
            log.info("gRPC on %s", address_of(args.host, port))
            yield

    log.info("listening on %s; /ready says when to ask", url_of(sock))
    serving = Serving(
        settings=settings, drain_s=args.drain_seconds, beside=None if args.grpc_port is None else beside
    )
    return await serve(begun, operation, sock, serving)


def settings_of(args: argparse.Namespace, name: str) -> Settings:
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
        model_name=name, api_keys=keys, management_key=management_key, cors_origins=tuple(args.cors_origin),
        chat_template=template_of(args.template), parser=args.parser, log_prompts=args.log_prompts, **fields,
    )  # fmt: skip


def template_of(name: str | None) -> str | None:
    """A template's text, or its name."""
    from maxstack.chat.command import CHATML, template_in

    return name if name in (None, CHATML) else template_in(Path(name).expanduser())


def adapter_of(text: str) -> tuple[str, str]:
    """NAME=FOLDER."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, folder


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def port_of(text: str) -> int:
    """A port's number."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: 0 to 65535")
    return int(text)


def seconds(text: str) -> float:
    """A time, longer than nothing."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e7:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value
