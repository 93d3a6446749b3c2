"""POST /v1/completions."""

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
from maxstack.serve.http.errors import refused
from maxstack.serve.http.forms import form_of
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
from maxstack.serve.http.logprobs import legacy_logprobs, prompt_logprobs
from maxstack.serve.http.operation import Seen
from maxstack.serve.http.schemas.completions import CompletionRequest
from maxstack.serve.http.spelling import Offsets
from maxstack.serve.http.sse import DONE, event
from maxstack.serve.output import Delta, Output
from maxstack.serve.stream import Stream

DEFAULT_NEW = 16
"""New tokens where nothing is said, as OpenAI has it."""


@dataclass
class Job:
    """A completion on its way: what is asked, made ready. `texts` are the prompts, as `echo` shows them."""

    front: Front
    asked: CompletionRequest
    seen: Seen
    prompts: list[list[int]]
    texts: list[str]
    params: list[SamplingParams]
    adapter: str | None
    constraint: Compiled | None = None

    def __post_init__(self):
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self.model = self.asked.model or self.front.settings.model_name

    def open(self) -> list[Stream]:
        """Ask the engine: the answers to the first prompt, to the second, …"""
        streams: list[Stream] = []
        with closing(self.front.engine, streams, on_error=True):
            for p, (ids, params) in enumerate(zip(self.prompts, self.params, strict=True)):
                streams += self.front.open(
                    ids, params, self.asked, f"{self.id}-{p}", self.seen, tries=self.asked.tries,
                    constraint=self.constraint, adapter=self.adapter,
                )  # fmt: skip
        return streams

    def shell(self) -> dict[str, Any]:
        """What answer and chunks begin with."""
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def usage(self) -> dict[str, Any]:
        """Of all prompts, each counted once."""
        return usage(sum(map(len, self.prompts)), self.seen.completion_tokens, self.seen.cached_tokens)


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


async def ready(front: Front, asked: CompletionRequest, seen: Seen) -> Job:
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
    return Job(front, asked, seen, prompts, texts, params, adapter, constraint)


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


async def answered(job: Job) -> dict[str, Any]:
    """The whole answer."""
    streams = job.open()
    with closing(job.front.engine, streams):
        outputs = await wholes(streams)
    note_tokens(job.seen, sum(len(output.token_ids) for output in outputs))
    tries, choices = job.asked.tries, []
    for p in range(len(job.prompts)):
        own = outputs[p * tries : (p + 1) * tries]
        job.seen.cached_tokens += max(output.cached_tokens for output in own)
        of_prompt = own[0].prompt_logprobs  # of the first alone, which has read the prompt
        for output in best(own, job.asked.answers) if tries > job.asked.answers else own:
            choices.append(choice(job, len(choices), p, output, of_prompt))
    return {**job.shell(), "choices": choices, "usage": job.usage()}


def choice(
    job: Job, index: int, prompt: int, output: Output, of_prompt: list[TokenLogprobs | None] | None
) -> dict[str, Any]:
    """One answer."""
    writer = ChoiceWriter(job, index, prompt)
    delta = Delta(output.token_ids, output.text, output.logprobs or [], output.finish_reason)
    done = writer.made(delta, of_prompt)
    if job.asked.prompt_logprobs is not None and of_prompt is not None:
        done["prompt_logprobs"] = prompt_logprobs(of_prompt, job.front.spelling)
    if job.asked.return_token_ids:
        done["prompt_token_ids"] = job.prompts[prompt]
    return done


async def streamed(job: Job) -> AsyncGenerator[bytes]:
    """The answer as events."""
    streams = job.open()
    with closing(job.front.engine, streams):
        tries = job.asked.tries
        writers = [ChoiceWriter(job, i, i // tries) for i in range(len(streams))]
        async for i, delta in merged(streams):
            note_tokens(job.seen, len(delta.token_ids))
            if delta.token_ids or delta.text or delta.finish_reason:
                of_prompt = streams[i - i % tries].answer.output.prompt_logprobs
                yield event({**job.shell(), "choices": [writers[i].made(delta, of_prompt)]})
        cached = [stream.answer.output.cached_tokens for stream in streams]
        job.seen.cached_tokens = sum(max(cached[i : i + tries]) for i in range(0, len(cached), tries))
        if job.asked.stream_options and job.asked.stream_options.include_usage:
            yield event({**job.shell(), "choices": [], "usage": job.usage()})
        yield DONE


class ChoiceWriter:
    """The pieces of one answer; the first has the prompt, where it is to be echoed."""

    def __init__(self, job: Job, index: int, prompt: int):
        self._job, self._index, self._prompt = job, index, prompt
        self._offsets = Offsets(job.front.tokenizer)
        self._begun = not job.asked.echo

    def made(self, delta: Delta, of_prompt: list[TokenLogprobs | None] | None) -> dict[str, Any]:
        """A piece, as a choice of a chunk or of the answer."""
        asked, text = self._job.asked, delta.text
        ids, found = list(delta.token_ids), list[TokenLogprobs | None](delta.logprobs)
        if not self._begun:
            self._begun = True
            text = self._job.texts[self._prompt] + text
            ids, found = [*self._job.prompts[self._prompt], *ids], [*(of_prompt or ()), *found]
        logprobs = None
        if asked.logprobs is not None:
            logprobs = legacy_logprobs(ids, found, self._offsets.next(ids), self._job.front.spelling)
        reason = None if delta.finish_reason is None else finish_of(delta.finish_reason, self._job.seen)
        made = {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return made | ({"token_ids": list(delta.token_ids)} if asked.return_token_ids else {})
