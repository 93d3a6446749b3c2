"""The arguments of `maxstack serve`."""

import argparse
from pathlib import Path
from typing import Any

WEIGHTS = ("int8", "int4-g32", "int4-g128")
"""Those of `kernels.quantized_matmul`, which takes jax along: whoever asks for --help need not wait for it."""
KV = ("int8", "int4", "bfloat16", "float32")


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
    add(
        "--weights",
        choices=WEIGHTS,
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
    add("--kv", choices=KV, help="type of the cache's numbers; int8 holds twice the tokens of bfloat16")
    add("--tensor", type=positive, default=1, metavar="N",
        help="devices that share the model (default 1), those of this machine or of all processes together; kv heads "
        "must divide by it")  # fmt: skip
    add("--max-length", type=positive, metavar="N", help="tokens of prompt and answer together, at most")
    add("--rows", type=positive, metavar="N", help="requests worked on at once")
    add("--pages", type=positive, metavar="N", help="pages of the cache (default: what fits)")
    add("--waiting", type=positive, metavar="N", help="requests that may wait; more get 429 (default 256)")
    add("--drafts", type=positive, metavar="N",
        help="tokens guessed ahead and checked in one step, where it pays (default: none)")  # fmt: skip
    add("--draft-model", metavar="M",
        help="a small model with the same tokens that guesses instead (4 a step unless --drafts says)")  # fmt: skip
    add("--invariant", action="store_true",
        help="answers are the same to the last bit in any company, which costs speed where XLA computes")  # fmt: skip
    add("--compile-only", action="store_true",
        help="fill the cache of compiled programs, so that the next start is fast, and leave")  # fmt: skip


def _network(group: Any) -> None:
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine alone)")
    add("--port", type=port_of, default=8000, help="0 for any that is free (default %(default)s)")
    add("--grpc-port", type=port_of, metavar="PORT", help="also serve gRPC there (default: not)")
    add("--tls-cert", type=Path, metavar="FILE", help="speak TLS with this certificate (PEM, with its chain)")
    add("--tls-key", type=Path, metavar="FILE", help="the certificate's key (PEM, without a password)")
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
    add("--stuck-after", type=seconds, default=None, metavar="S",
        help="a step that takes this long is called stuck, and /health is 503 (default 60, more for a large model on "
        "a processor; ten times the slowest step so far, if that is more)")  # fmt: skip
    add("--deadline", type=seconds, default=None, metavar="S", help="end every request after this long")


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
