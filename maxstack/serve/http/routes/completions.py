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
from maxstack.serve.engine import Stream
from maxstack.serve.http.errors import refused
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
from maxstack.serve.http.logprobs import legacy_logprobs
from maxstack.serve.http.operation import Seen
from maxstack.serve.http.schemas.completions import CompletionRequest
from maxstack.serve.http.sse import DONE, event
from maxstack.serve.output import Delta, Output

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
    scores_only: bool
    """No new token is wanted: the one that is made is left out."""
    constraint: Any = None

    def __post_init__(self):
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self.model = self.asked.model or self.front.settings.model_name

    def open(self) -> list[Stream]:
        """Ask the engine: the answers to the first prompt, to the second, …"""
        streams: list[Stream] = []
        with closing(self.front.engine, streams, on_error=True):
            for ids, params in zip(self.prompts, self.params, strict=True):
                streams += self.front.open(
                    ids, params, self.asked, self.id, self.seen, tries=self.asked.tries, first=len(streams),
                    constraint=self.constraint, adapter=self.adapter,
                )  # fmt: skip
        return streams

    def shell(self) -> dict[str, Any]:
        """What answer and chunks begin with."""
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}

    def usage(self) -> dict[str, Any]:
        """Of all prompts, each counted once."""
        done = 0 if self.scores_only else self.seen.completion_tokens
        return usage(sum(map(len, self.prompts)), done, self.seen.cached_tokens)


def completion_routes(front: Front) -> APIRouter:
    """The route, for one engine."""
    router = APIRouter(tags=["completions"])

    @router.post("/v1/completions", summary="Continue text or tokens")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        job = ready(front, asked, request.state.seen)
        if asked.stream:
            return await event_stream(request, streamed(job), job.seen, front.settings)
        return JSONResponse(await while_connected(request, answered(job)))

    return router


def ready(front: Front, asked: CompletionRequest, seen: Seen) -> Job:
    """Everything that can be wrong with a request is found here."""
    adapter = front.adapter(asked.model)
    seen.model, seen.stream = asked.model or front.settings.model_name, bool(asked.stream)
    if asked.suffix:
        raise refused("suffix is not supported: this model continues text, it does not fill in", "suffix")
    if asked.max_tokens == 0 and not asked.echo:
        raise refused("max_tokens is 0: only with echo, which gives back the prompt", "max_tokens")
    front.check_budget(len(asked.prompts), asked.tries, asked.max_tokens or DEFAULT_NEW)
    prompts, texts = tokenized(front, asked)
    scores_only = asked.max_tokens == 0
    most = [1 if scores_only else front.room(ids, asked.max_tokens, DEFAULT_NEW) for ids in prompts]
    logprobs = asked.logprobs
    if logprobs is None and asked.tries > asked.answers:
        logprobs = 0  # the best are found by them
    of_prompt = asked.logprobs if asked.echo else asked.prompt_logprobs
    params = [asked.params(n, logprobs=logprobs, prompt_logprobs=of_prompt) for n in most]
    return Job(front, asked, seen, prompts, texts, params, adapter, scores_only)


def tokenized(front: Front, asked: CompletionRequest) -> tuple[list[list[int]], list[str]]:
    """The prompts as tokens, and as texts where they are echoed."""
    ids = [list(front.engine.ids(prompt)) for prompt in asked.prompts]
    texts = [
        "" if not asked.echo else p if isinstance(p, str) else front.tokenizer.decode(p)
        for p in asked.prompts
    ]
    return ids, texts


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
        for output in best(own, job.asked.answers) if tries > job.asked.answers else own:
            choices.append(choice(job, len(choices), p, output))
    return {**job.shell(), "choices": choices, "usage": job.usage()}


def choice(job: Job, index: int, prompt: int, output: Output) -> dict[str, Any]:
    """One answer."""
    asked, reason = job.asked, finish_of(output.finish_reason, job.seen)
    ids, text = ([], "") if job.scores_only else (output.token_ids, output.text)
    logprobs = None
    if asked.logprobs is not None:
        found: list[TokenLogprobs | None] = [] if job.scores_only else list(output.logprobs or [])
        before = job.prompts[prompt] if asked.echo else []
        found = [*(output.prompt_logprobs or ())][: len(before)] + found
        tokens = [*before, *ids]
        logprobs = legacy_logprobs(tokens, found, job.front.spelling.offsets(tokens), job.front.spelling)
    done: dict[str, Any] = {
        "index": index,
        "text": job.texts[prompt] + text,
        "logprobs": logprobs,
        "finish_reason": "length" if job.scores_only else reason,
    }
    if asked.return_token_ids:
        done |= {"token_ids": ids, "prompt_token_ids": job.prompts[prompt]}
    return done


async def streamed(job: Job) -> AsyncGenerator[bytes]:
    """The answer as events."""
    streams = job.open()
    with closing(job.front.engine, streams):
        async for i, delta in merged(streams):
            note_tokens(job.seen, len(delta.token_ids))
            yield event({**job.shell(), "choices": [piece(job, i, delta)]})
        if job.asked.stream_options and job.asked.stream_options.include_usage:
            yield event({**job.shell(), "choices": [], "usage": job.usage()})
        yield DONE


def piece(job: Job, index: int, delta: Delta) -> dict[str, Any]:
    """What is added to one answer."""
    reason = None if delta.finish_reason is None else finish_of(delta.finish_reason, job.seen)
    return {"index": index, "text": delta.text, "logprobs": None, "finish_reason": reason}
