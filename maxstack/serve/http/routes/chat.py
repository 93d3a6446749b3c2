"""POST /v1/chat/completions."""

import uuid
from dataclasses import dataclass
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from maxstack.models.generation.output import TokenLogprobs
from maxstack.models.generation.params import SamplingParams
from maxstack.serve.http.conversation import Prompt, render
from maxstack.serve.http.counted import finish_of
from maxstack.serve.http.errors import refused
from maxstack.serve.http.forms import calls_of, form_of
from maxstack.serve.http.front import Front
from maxstack.serve.http.job import Job, answered, streamed
from maxstack.serve.http.logprobs import chat_logprobs
from maxstack.serve.http.operation import Seen
from maxstack.serve.http.said import CallStart, Parser, Piece, Text, delta_of, message_of
from maxstack.serve.http.schemas.chat import ChatRequest
from maxstack.serve.http.sse import Frame, event
from maxstack.serve.http.streams import event_stream, while_connected
from maxstack.serve.output import Delta, Output
from maxstack.serve.stream import Stream


@dataclass
class Chat(Job):
    """A conversation to be answered."""

    prompt: Prompt
    params: SamplingParams

    prefix: ClassVar[str] = "chatcmpl"
    whole_kind: ClassVar[str] = "chat.completion"
    chunk_kind: ClassVar[str] = "chat.completion.chunk"

    @property
    def prompt_tokens(self) -> int:
        """Of the rendered conversation."""
        return len(self.prompt.ids)

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

    def parser(self) -> Parser:
        """For one answer."""
        return self.prompt.parser()

    def thought_tokens(self, output: Output) -> int:
        """How many tokens of an answer are thoughts."""
        return self.prompt.counter().take(output.token_ids)

    def choice(self, index: int, prompt: int, output: Output, first: Output) -> dict[str, Any]:
        """One whole answer."""
        parser = self.parser()
        pieces = [*parser.feed(output.text), *parser.end()]
        reason = finish_of(output.finish_reason, self.seen)
        called = any(isinstance(piece, CallStart) for piece in pieces)
        logprobs = chat_logprobs(output.logprobs or [], self.front.spelling) if self.wants_logprobs else None
        done: dict[str, Any] = {
            "index": index,
            "message": message_of(pieces),
            "logprobs": logprobs,
            "finish_reason": "tool_calls" if called and reason == "stop" else reason,
        }
        if self.asked.return_token_ids:
            done["token_ids"] = output.token_ids
        return done

    def writer(self, index: int, first: Stream) -> "ChatWriter":
        """Of one answer."""
        return ChatWriter(self, index)


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


async def ready(front: Front, asked: ChatRequest, seen: Seen) -> Chat:
    """Everything that can be wrong with a request is found here."""
    asked.check()
    adapter = front.adapter(asked.model)
    seen.model, seen.stream = asked.model or front.settings.model_name, bool(asked.stream)
    named = form_of(asked)
    calls = calls_of(asked, front.manner.style)
    if named is not None and calls is not None:
        raise refused(f"{named[0]} and tools each say what form the answer has: give one", named[0])
    prompt = await render(front, asked)
    form = named or calls
    bound = None if form is None else (form[0], front.manner.bound(form[1], prompt.text))
    constraint = await front.compiled(bound)
    most = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
    max_tokens = front.room(prompt.ids, most, None)
    front.check_budget(1, asked.tries, max_tokens)
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    if logprobs is None and asked.tries > asked.answers:
        logprobs = 0  # the best are found by them
    params = asked.params(max_tokens, logprobs=logprobs, prompt_logprobs=None)
    return Chat(front, asked, seen, adapter, constraint, prompt, prompt.ended(params))


class ChatWriter:
    """The chunks of one answer."""

    def __init__(self, job: Chat, index: int):
        self._job, self._index, self._parser = job, index, job.parser()
        self._shell = job.shell(job.chunk_kind)
        options = job.asked.stream_options
        self._usage = bool(options and options.include_usage)
        self._running = bool(options and options.continuous_usage_stats)
        self._logprobs: list[TokenLogprobs] = []
        self._called, self._thoughts = False, job.prompt.counter()
        hole = uuid.uuid4().hex
        plain = not (job.wants_logprobs or job.asked.return_token_ids or self._running)
        self._text = Frame(self._data({"content": hole}, None, None), hole) if plain else None
        """A chunk that only has text: nearly all are so."""

    def begin(self) -> bytes:
        """The role."""
        return event(self._data({"role": "assistant", "content": ""}, None, None))

    def events(self, delta: Delta) -> bytes:
        """Nothing yet, or a chunk, and at the end one with the finish reason."""
        self._job.seen.reasoning_tokens += self._thoughts.take(delta.token_ids)
        pieces = self._parser.feed(delta.text) if delta.text else []
        if delta.finish_reason is None and self._text is not None:
            if not pieces:
                return b""
            if len(pieces) == 1 and isinstance(pieces[0], Text):
                return self._text(pieces[0].text)
        if delta.finish_reason is not None:
            pieces = [*pieces, *self._parser.end()]
        return self._chunks(pieces, delta)

    def _chunks(self, pieces: list[Piece], delta: Delta) -> bytes:
        self._called |= any(isinstance(piece, CallStart) for piece in pieces)
        self._logprobs += delta.logprobs if self._job.wants_logprobs else ()
        made = b""
        if pieces or (self._logprobs and delta.finish_reason):
            made = event(self._data(delta_of(pieces), self._told(), None, delta.token_ids))
        if delta.finish_reason is not None:
            reason = finish_of(delta.finish_reason, self._job.seen)
            reason = "tool_calls" if self._called and reason == "stop" else reason
            made += event(self._data({}, None, reason))
        return made

    def _told(self) -> dict[str, Any] | None:
        found, self._logprobs = self._logprobs, []
        return chat_logprobs(found, self._job.front.spelling) if self._job.wants_logprobs else None

    def _data(
        self,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None,
        reason: str | None,
        ids: list[int] | None = None,
    ) -> dict[str, Any]:
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
            chunk["usage"] = self._job.usage()
        elif self._usage:
            chunk["usage"] = None
        return chunk
