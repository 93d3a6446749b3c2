"""What is kept of a request that is over: a line for the log, spans for a trace."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from maxstack.data.tokenizer import Tokenizer
from maxstack.serve.engine import Stream
from maxstack.serve.http.operation import Seen
from maxstack.serve.operate.request_log import timestamp

PROMPTS = "prompts"
Part = tuple[str, float, float, Mapping[str, Any]]


def record_of(seen: Seen, streams: Sequence[Stream], *, prompts: bool = False) -> dict[str, Any]:
    """A line of the request log. It holds no text of prompt or answer, unless `prompts` says so."""
    ended = seen.ended or time.monotonic()
    record: dict[str, Any] = {
        "time": timestamp(time.time() - (time.monotonic() - seen.arrived)),
        "id": seen.id, "client": seen.client, "method": seen.method, "path": seen.path, "status": seen.status,
        "seconds": _round(ended - seen.arrived),
    }  # fmt: skip
    if seen.error:
        record["error"] = seen.error
    if not streams:
        return record
    first = [stream.first - stream.asked for stream in streams if stream.first is not None]
    waited = [stream.admitted - stream.asked for stream in streams if stream.admitted is not None]
    outputs = [stream.answer.output for stream in streams]
    record |= {
        "model": seen.model, "stream": seen.stream, "max_tokens": seen.max_tokens, "answers": len(streams),
        "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "cached_tokens": sum(output.cached_tokens for output in outputs),
        "completion_tokens": sum(len(output.token_ids) for output in outputs),
        "finish": [output.finish_reason for output in outputs],
        "queue_s": _round(max(waited)) if waited else None, "ttft_s": _round(min(first)) if first else None,
    }  # fmt: skip
    if prompts:
        record[PROMPTS] = [output.prompt_token_ids for output in outputs]
        record["answers_text"] = [output.text for output in outputs]
    return record


def with_texts(tokenizer: Tokenizer | None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Completes a record: token ids of prompts become text."""

    def finish(record: dict[str, Any]) -> dict[str, Any]:
        if PROMPTS in record and tokenizer is not None:
            record[PROMPTS] = [tokenizer.decode(list(ids)) for ids in record[PROMPTS]]
        return record

    return finish


def trace_of(
    seen: Seen, streams: Sequence[Stream], model: str
) -> tuple[str, float, float, dict[str, Any], Mapping[str, str], list[Part], str | None]:
    """The arguments of `Tracer.request`: names by OpenTelemetry's conventions for generative AI."""
    ended = seen.ended or time.monotonic()
    outputs = [stream.answer.output for stream in streams]
    attributes: dict[str, Any] = {
        "http.request.method": seen.method, "url.path": seen.path, "http.response.status_code": seen.status,
        "maxstack.request_id": seen.id, "error.type": seen.error,
    }  # fmt: skip
    if streams:
        attributes |= {
            "gen_ai.provider.name": "maxstack", "gen_ai.request.model": seen.model or model,
            "gen_ai.response.model": model, "gen_ai.request.max_tokens": seen.max_tokens,
            "gen_ai.usage.input_tokens": sum(len(output.prompt_token_ids) for output in outputs),
            "gen_ai.usage.output_tokens": sum(len(output.token_ids) for output in outputs),
            "gen_ai.response.finish_reasons": [output.finish_reason or "" for output in outputs],
        }  # fmt: skip
    parts = [part for stream in streams for part in parts_of(stream, ended)]
    error = seen.error if seen.status >= 500 or (seen.error and seen.status == 200) else None
    return f"{seen.method} {seen.path}", seen.arrived, ended, attributes, seen.trace, parts, error


def parts_of(stream: Stream, ended: float) -> list[Part]:
    """Waiting, reading and writing of one answer, as far as it came."""
    output, parts = stream.answer.output, []
    admitted = ended if stream.admitted is None else stream.admitted
    parts.append(("queue", stream.asked, admitted, {"maxstack.stream_id": output.id}))
    if stream.admitted is None:
        return parts
    own = {"maxstack.stream_id": output.id, "maxstack.cached_tokens": output.cached_tokens}
    parts.append(("prefill", admitted, ended if stream.first is None else stream.first, own))
    if stream.first is not None:
        own = {"maxstack.stream_id": output.id, "maxstack.tokens": len(output.token_ids)}
        parts.append(("decode", stream.first, ended if stream.ended is None else stream.ended, own))
    return parts


def _round(seconds: float) -> float:
    return round(seconds, 4)
