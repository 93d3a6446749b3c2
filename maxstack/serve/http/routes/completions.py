"""POST /v1/completions."""

import uuid
from dataclasses import dataclass
from typing import Any, ClassVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from maxstack.models.generation.output import TokenLogprobs
from maxstack.models.generation.params import SamplingParams
from maxstack.serve.http.counted import finish_of
from maxstack.serve.http.errors import refused
from maxstack.serve.http.forms import form_of
from maxstack.serve.http.front import Front
from maxstack.serve.http.job import Job, answered, streamed
from maxstack.serve.http.logprobs import legacy_logprobs, prompt_logprobs
from maxstack.serve.http.operation import Seen
from maxstack.serve.http.schemas.completions import CompletionRequest
from maxstack.serve.http.spelling import Offsets
from maxstack.serve.http.sse import Frame, event
from maxstack.serve.http.streams import closing, event_stream, while_connected
from maxstack.serve.output import Delta, Output
from maxstack.serve.stream import Stream

DEFAULT_NEW = 16
"""New tokens where nothing is said, as OpenAI has it."""


@dataclass
class Completion(Job):
    """Prompts to be continued. `texts` are the prompts as `echo` shows them."""

    prompts: list[list[int]]
    texts: list[str]
    params: list[SamplingParams]

    prefix: ClassVar[str] = "cmpl"
    whole_kind: ClassVar[str] = "text_completion"
    chunk_kind: ClassVar[str] = "text_completion"

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(map(len, self.prompts))

    @property
    def wants_logprobs(self) -> bool:
        """Whether the answer shows them."""
        return self.asked.logprobs is not None

    def open(self) -> list[Stream]:
        """Ask the engine."""
        streams: list[Stream] = []
        with closing(self.front.engine, streams, on_error=True):
            for p, (ids, params) in enumerate(zip(self.prompts, self.params, strict=True)):
                streams += self.front.open(
                    ids, params, self.asked, f"{self.id}-{p}", self.seen, tries=self.asked.tries,
                    constraint=self.constraint, adapter=self.adapter,
                )  # fmt: skip
        return streams

    def choice(self, index: int, prompt: int, output: Output, first: Output) -> dict[str, Any]:
        """One whole answer."""
        delta = Delta(output.token_ids, output.text, output.logprobs or [], output.finish_reason)
        done = CompletionWriter(self, index, prompt, first).choice(delta)
        if self.asked.prompt_logprobs is not None and first.prompt_logprobs is not None:
            done["prompt_logprobs"] = prompt_logprobs(first.prompt_logprobs, self.front.spelling)
        if self.asked.return_token_ids:
            done["prompt_token_ids"] = self.prompts[prompt]
        return done

    def writer(self, index: int, first: Stream) -> "CompletionWriter":
        """Of one answer."""
        return CompletionWriter(self, index, index // self.asked.tries, first.answer.output)


def completion_routes(front: Front) -> APIRouter:
    """The route, for one engine."""
    router = APIRouter(tags=["completions"])

    @router.post("/v1/completions", summary="Continue text or tokens")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        job = await ready(front, asked, request.state.seen)
        if asked.stream:
            return await event_stream(request, streamed(job), job.seen, front.settings)
        return JSONResponse(await while_connected(request, answered(job)))

    return router


async def ready(front: Front, asked: CompletionRequest, seen: Seen) -> Completion:
    """Everything that can be wrong with a request is found here."""
    asked.check()
    adapter = front.adapter(asked.model)
    seen.model, seen.stream = asked.model or front.settings.model_name, bool(asked.stream)
    if asked.suffix:
        raise refused("suffix is not supported: this model continues text, it does not fill in", "suffix")
    if asked.max_tokens == 0 and not asked.echo:
        raise refused("max_tokens is 0: only with echo, which gives back the prompt", "max_tokens")
    if asked.max_tokens == 0 and asked.answers > 1:
        raise refused("max_tokens is 0: then there is one answer, n must be 1", "n")
    front.check_budget(len(asked.prompts), asked.tries, asked.max_tokens or DEFAULT_NEW)
    prompts = await front.ids_of(asked.prompts, asked.add_special_tokens, asked.parse_special)
    texts = [
        "" if not asked.echo else prompt if isinstance(prompt, str) else front.tokenizer.decode(prompt)
        for prompt in asked.prompts
    ]
    params = [settings_of(front, asked, ids) for ids in prompts]
    constraint = await front.compiled(form_of(asked))
    return Completion(front, asked, seen, adapter, constraint, prompts, texts, params)


def settings_of(front: Front, asked: CompletionRequest, ids: list[int]) -> SamplingParams:
    """The parameters for a prompt."""
    logprobs, most = asked.logprobs, front.room(ids, asked.max_tokens, DEFAULT_NEW)
    of_prompt = asked.logprobs if asked.echo else asked.prompt_logprobs
    if logprobs is None and asked.tries > asked.answers:
        logprobs = 0  # the best are found by them
    if asked.echo and asked.logprobs is not None and most == 1:
        # Who scores a prompt so counts on an entry for the new token, and drops it: also when it is an end token.
        asked = asked.model_copy(update={"ignore_eos": True, "stop": None, "stop_token_ids": None})
    return asked.params(most, logprobs=logprobs, prompt_logprobs=of_prompt)


class CompletionWriter:
    """The pieces of one answer; the first has the prompt, where it is to be echoed."""

    def __init__(self, job: Completion, index: int, prompt: int, first: Output):
        """`first` is the answer that has read the prompt, and knows its log-probabilities."""
        self._job, self._index, self._prompt, self._first = job, index, prompt, first
        self._offsets = Offsets(job.front.tokenizer)
        self._begun = not job.asked.echo
        self._shell, hole = job.shell(job.chunk_kind), uuid.uuid4().hex
        plain = not (job.wants_logprobs or job.asked.return_token_ids)
        self._text = Frame(self._data(self._made(hole, None, None)), hole) if plain else None
        """A chunk that only has text."""

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def events(self, delta: Delta) -> bytes:
        """A chunk, where there is something to say."""
        if self._text is not None and self._begun and delta.finish_reason is None:
            return self._text(delta.text) if delta.token_ids or delta.text else b""
        if delta.token_ids or delta.text or delta.finish_reason:
            return event(self._data(self.choice(delta)))
        return b""

    def choice(self, delta: Delta) -> dict[str, Any]:
        """A piece, or all, as a choice of a chunk or of the answer."""
        asked, text = self._job.asked, delta.text
        ids, found = list(delta.token_ids), list[TokenLogprobs | None](delta.logprobs)
        if not self._begun:
            self._begun = True
            text = self._job.texts[self._prompt] + text
            ids = [*self._job.prompts[self._prompt], *ids]
            found = [*(self._first.prompt_logprobs or ()), *found]
        logprobs = None
        if asked.logprobs is not None:
            logprobs = legacy_logprobs(ids, found, self._offsets.next(ids), self._job.front.spelling)
        reason = None if delta.finish_reason is None else finish_of(delta.finish_reason, self._job.seen)
        made = self._made(text, logprobs, reason)
        return made | ({"token_ids": list(delta.token_ids)} if asked.return_token_ids else {})

    def _made(self, text: str, logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _data(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._shell, "choices": [choice]}
