"""One request on its way to the engine and back, whole or streamed: what chats and completions do alike."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from maxstack.serve.constrain.matching import Compiled
from maxstack.serve.http.counted import note_tokens, usage
from maxstack.serve.http.front import Front
from maxstack.serve.http.operation import Seen
from maxstack.serve.http.sse import DONE, event
from maxstack.serve.http.streams import best, closing, merged, wholes
from maxstack.serve.output import Delta, Output
from maxstack.serve.stream import Stream


@runtime_checkable
class Writer(Protocol):
    """Writes one answer of a stream."""

    def begin(self) -> bytes:
        """What comes before all; b"" for nothing."""
        ...

    def events(self, delta: Delta) -> bytes:
        """What a piece of the answer makes, all of it in one; b"" for nothing yet."""
        ...


@dataclass
class Job(ABC):
    """What was asked, found to be in order, and made ready."""

    front: Front
    asked: Any
    seen: Seen
    adapter: str | None
    constraint: Compiled | None

    prefix: ClassVar[str]
    """Of ids."""
    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    """What the answer is called, and a piece of it."""

    def __post_init__(self):
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.model = self.asked.model or self.front.settings.model_name

    @property
    @abstractmethod
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""

    @abstractmethod
    def open(self) -> list[Stream]:
        """Ask the engine: the answers to the first prompt, to the second, …"""

    @abstractmethod
    def choice(self, index: int, prompt: int, output: Output, first: Output) -> dict[str, Any]:
        """One whole answer; `first` is the one that has read the prompt."""

    @abstractmethod
    def writer(self, index: int, first: Stream) -> Writer:
        """What writes an answer as it comes."""

    def thought_tokens(self, output: Output) -> int:
        """How many tokens of an answer are thoughts."""
        return 0

    def shell(self, kind: str) -> dict[str, Any]:
        """What answer and chunks begin with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def usage(self) -> dict[str, Any]:
        """What has been used so far."""
        return usage(self.prompt_tokens, self.seen)


async def answered(job: Job) -> dict[str, Any]:
    """The whole answer."""
    streams = job.open()
    with closing(job.front.engine, streams):
        outputs = await wholes(streams)
    note_tokens(job.seen, sum(len(output.token_ids) for output in outputs))
    job.seen.reasoning_tokens = sum(map(job.thought_tokens, outputs))
    tries, kept, choices = job.asked.tries, job.asked.answers, []
    for p, start in enumerate(range(0, len(outputs), tries)):
        own = outputs[start : start + tries]
        job.seen.cached_tokens += max(output.cached_tokens for output in own)
        for output in best(own, kept) if tries > kept else own:
            choices.append(job.choice(len(choices), p, output, own[0]))
    return {**job.shell(job.whole_kind), "choices": choices, "usage": job.usage()}


async def streamed(job: Job) -> AsyncGenerator[bytes]:
    """The answer as events."""
    streams, tries = job.open(), job.asked.tries
    with closing(job.front.engine, streams):
        writers = [job.writer(i, streams[i - i % tries]) for i in range(len(streams))]
        begun = b"".join(writer.begin() for writer in writers)
        async for i, delta in merged(streams):
            note_tokens(job.seen, len(delta.token_ids))
            told = writers[i].events(delta)
            if begun:  # not before: an error may still have a status of its own
                told, begun = begun + told, b""
            if told:
                yield told
        cached = [stream.answer.output.cached_tokens for stream in streams]
        job.seen.cached_tokens = sum(max(cached[i : i + tries]) for i in range(0, len(cached), tries))
        options, end = job.asked.stream_options, DONE
        if options and options.include_usage:
            end = event({**job.shell(job.chunk_kind), "choices": [], "usage": job.usage()}) + DONE
        yield end
