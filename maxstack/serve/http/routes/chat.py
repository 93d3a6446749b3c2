"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from maxstack.models.generation.output import TokenLogprobs
from maxstack.models.generation.params import SamplingParams
from maxstack.serve.constrain.matching import Compiled
from maxstack.serve.engine import Stream
from maxstack.serve.http.conversation import Prompt, render
from maxstack.serve.http.errors import refused
from maxstack.serve.http.forms import calls_of, form_of
from maxstack.serve.http.front import (
    Front,
    best,
    closing,
    event_stream,
    finish_of,
    merged,
    note_tokens,
    usage,
    while_connected,
    wholes,
)
from maxstack.serve.http.logprobs import chat_logprobs
from maxstack.serve.http.operation import Seen
from maxstack.serve.http.said import CallStart, Parser, delta_of, message_of
from maxstack.serve.http.schemas.chat import ChatRequest
from maxstack.serve.http.sse import DONE, event
from maxstack.serve.output import Delta, Output


@dataclass
class Job:
    """A chat on its way: what is asked, made ready."""

    front: Front
    asked: ChatRequest
    seen: Seen
    prompt: Prompt
    params: SamplingParams
    adapter: str | None
    constraint: Compiled | None = None

    def __post_init__(self):
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.model = self.asked.model or self.front.settings.model_name

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer shows them."""
        return bool(self.asked.logprobs)

    def open(self) -> list[Stream]:
        """Ask the engine."""
        return self.front.open(
            self.prompt.ids, self.params, self.asked, self.id, self.seen, tries=self.asked.tries,
            constraint=self.constraint, adapter=self.adapter, keep=self.parser().marks,
        )  # fmt: skip

    def shell(self, kind: str) -> dict[str, Any]:
        """What answer and chunks begin with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def parser(self) -> Parser:
        """For one answer."""
        return self.prompt.parser()


def chat_routes(front: Front) -> APIRouter:
    """The route, for one engine."""
    router = APIRouter(tags=["chat"])

    @router.post("/v1/chat/completions", summary="Answer a conversation")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        job = await ready(front, asked, request.state.seen)
        if asked.stream:
            return await event_stream(request, streamed(job), job.seen, front.settings)
        return JSONResponse(await while_connected(request, answered(job)))

    return router


async def ready(front: Front, asked: ChatRequest, seen: Seen) -> Job:
    """Everything that can be wrong with a request is found here."""
    asked.check()
    adapter = front.adapter(asked.model)
    seen.model, seen.stream = asked.model or front.settings.model_name, bool(asked.stream)
    named = form_of(asked)
    calls = calls_of(asked, front.settings.parser or front.renderer.template, front.tokenizer.added_tokens)
    if named is not None and calls is not None:
        raise refused(f"{named[0]} and tools each say what form the answer has: give one", named[0])
    constraint = await front.compiled(named or calls)
    prompt = await render(front, asked, constraint is not None)
    most = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
    max_tokens = front.room(prompt.ids, most, None)
    front.check_budget(1, asked.tries, max_tokens)
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    if logprobs is None and asked.tries > asked.answers:
        logprobs = 0  # the best are found by them
    params = asked.params(max_tokens, logprobs=logprobs, prompt_logprobs=None)
    return Job(front, asked, seen, prompt, prompt.ended(params), adapter, constraint)


async def answered(job: Job) -> dict[str, Any]:
    """The whole answer."""
    streams = job.open()
    with closing(job.front.engine, streams):
        outputs = await wholes(streams)
    tokens = sum(len(output.token_ids) for output in outputs)
    job.seen.cached_tokens = max(output.cached_tokens for output in outputs)
    note_tokens(job.seen, tokens)
    outputs = best(outputs, job.asked.answers) if job.asked.tries > job.asked.answers else outputs
    return {
        **job.shell("chat.completion"),
        "choices": [choice(job, i, output) for i, output in enumerate(outputs)],
        "usage": usage(len(job.prompt.ids), tokens, job.seen.cached_tokens),
    }


def choice(job: Job, index: int, output: Output) -> dict[str, Any]:
    """One answer."""
    parser = job.parser()
    pieces = [*parser.feed(output.text), *parser.end()]
    reason = finish_of(output.finish_reason, job.seen)
    called = any(isinstance(piece, CallStart) for piece in pieces)
    logprobs = chat_logprobs(output.logprobs or [], job.front.spelling) if job.wants_logprobs else None
    done: dict[str, Any] = {
        "index": index,
        "message": message_of(pieces),
        "logprobs": logprobs,
        "finish_reason": "tool_calls" if called and reason == "stop" else reason,
    }
    if job.asked.return_token_ids:
        done["token_ids"] = output.token_ids
    return done


async def streamed(job: Job) -> AsyncGenerator[bytes]:
    """The answer as events."""
    streams = job.open()
    with closing(job.front.engine, streams):
        writers = [ChoiceWriter(job, i) for i in range(len(streams))]
        begun = False
        async for i, delta in merged(streams):
            if not begun:  # not before: an error may still have a status of its own
                begun = True
                for writer in writers:
                    yield writer.role()
            note_tokens(job.seen, len(delta.token_ids))
            for chunk in writers[i].chunks(delta):
                yield chunk
        job.seen.cached_tokens = max(stream.answer.output.cached_tokens for stream in streams)
        if job.asked.stream_options and job.asked.stream_options.include_usage:
            total = usage(len(job.prompt.ids), job.seen.completion_tokens, job.seen.cached_tokens)
            yield event({**job.shell("chat.completion.chunk"), "choices": [], "usage": total})
        yield DONE


class ChoiceWriter:
    """The chunks of one answer."""

    def __init__(self, job: Job, index: int):
        self._job, self._index, self._parser = job, index, job.parser()
        self._shell = job.shell("chat.completion.chunk")
        options = job.asked.stream_options
        self._usage, self._running = bool(options and options.include_usage), False
        if options and options.continuous_usage_stats:
            self._running = True
        self._logprobs: list[TokenLogprobs] = []
        self._called = False

    def role(self) -> bytes:
        """The first."""
        return self._chunk({"role": "assistant", "content": ""}, None, None)

    def chunks(self, delta: Delta) -> list[bytes]:
        """What a piece of the answer makes: nothing yet, a chunk, and at the end one with the finish reason."""
        pieces = [*self._parser.feed(delta.text), *(self._parser.end() if delta.finish_reason else ())]
        self._called |= any(isinstance(piece, CallStart) for piece in pieces)
        self._logprobs += delta.logprobs if self._job.wants_logprobs else ()
        made: list[bytes] = []
        if pieces or (self._logprobs and delta.finish_reason):
            made.append(self._chunk(delta_of(pieces), self._told(), None, delta.token_ids))
        if delta.finish_reason is not None:
            reason = finish_of(delta.finish_reason, self._job.seen)
            made.append(self._chunk({}, None, "tool_calls" if self._called and reason == "stop" else reason))
        return made

    def _told(self) -> dict[str, Any] | None:
        found, self._logprobs = self._logprobs, []
        return chat_logprobs(found, self._job.front.spelling) if self._job.wants_logprobs else None

    def _chunk(
        self,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None,
        reason: str | None,
        ids: list[int] | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {
            "index": self._index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": reason,
        }
        if ids is not None and self._job.asked.return_token_ids:
            choice["token_ids"] = ids
        chunk = {**self._shell, "choices": [choice]}
        if self._running:
            seen = self._job.seen
            chunk["usage"] = usage(seen.prompt_tokens, seen.completion_tokens, seen.cached_tokens)
        elif self._usage:
            chunk["usage"] = None
        return event(chunk)
