"""A model that answers many at once: for async code, and for any other.

engine = Engine(model, tokenizer)
[output] = engine.generate(["The capital of France is"], SamplingParams(max_tokens=8, temperature=0.0))
"""

import asyncio
import dataclasses
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from maxstack.config import UserError
from maxstack.data.tokenizer import Tokenizer
from maxstack.kernels.paged_attention import PageType
from maxstack.models.generate import prompt_ids
from maxstack.models.generation.checks import check_request
from maxstack.models.generation.params import SamplingParams
from maxstack.models.rope import BY_LENGTH
from maxstack.models.transformer import Transformer, TransformerConfig
from maxstack.serve.constrain.matching import Compiled as Constrained
from maxstack.serve.device import Asked, Device
from maxstack.serve.errors import EngineDead
from maxstack.serve.forms import form_for
from maxstack.serve.loop import Loop, News, Progress
from maxstack.serve.output import Answer, Delta, Output
from maxstack.serve.plan import Limits
from maxstack.serve.request import Request
from maxstack.serve.scheduler import Scheduler
from maxstack.serve.sizes import default_limits

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams]


class AsyncEngine:
    """Requests from any number of coroutines, worked on together by a thread.

    The thread does nothing but plan and launch; tokens become text in the event loop of whoever asks. The engine
    holds the weights in the form that runs fastest here: on a CPU a copy.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        limits: Limits | None = None,
        kv_dtype: PageType | None = None,
        end_ids: Sequence[int] | None = None,
        on: str | None = None,
        buckets: Sequence[int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`limits` are by default what fits this machine; `kv_dtype` is the type of the cache's numbers, by default
        the model's compute type. `end_ids` end an answer (by default the tokenizer's `stop_ids`). `on` is the platform
        whose form of the programs is used: that at hand, unless told otherwise. `buckets` are the numbers of rows that
        decode steps are compiled for, by default the powers of two and all rows."""
        self.config, self.tokenizer = model.config, tokenizer
        kv_dtype = model.config.dtype if kv_dtype is None else kv_dtype
        self.limits = default_limits(model.config, kv_dtype) if limits is None else limits
        form, weights = form_for(model, on)
        device = Device(model.config, form, weights, self.limits, kv_dtype, buckets)
        self._loop = Loop(device, Scheduler(self.limits), self._deliver, clock)
        self._thread = threading.Thread(target=self._loop.run, name="maxstack-engine", daemon=True)
        self._clock, self._numbers = clock, itertools.count()
        self._open: dict[str, Stream] = {}
        default = () if tokenizer is None else tokenizer.stop_ids
        self.end_ids = frozenset(default if end_ids is None else end_ids)
        self._by_length = scales_by_length(model.config)

    def warm_up(self) -> None:
        """Compile everything, and begin to work. `stream` and the like do it first where nobody has."""
        if not self._thread.ident:
            self._loop.device.warm_up()
            self._thread.start()

    @property
    def progress(self) -> Progress:
        """What a watchdog looks at."""
        return self._loop.progress

    @property
    def dead(self) -> BaseException | None:
        """Why the engine has stopped; None while it works."""
        return self._loop.dead

    @property
    def compilations(self) -> int:
        """Programs that were compiled since the engine was ready: 0, or something is wrong."""
        return self._loop.compilations.count

    @property
    def scheduler(self) -> Scheduler:
        """For its counters: numbers that other threads may read."""
        return self._loop.scheduler

    async def stream(self, prompt: Prompt, params: SamplingParams, **options: Any) -> AsyncGenerator[Delta]:
        """The answer piece by piece; whoever leaves early ends the request. `options` as in `open`."""
        stream = self.open(prompt, params, **options)
        try:
            while True:
                delta = await stream.next()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            self.abort(stream.id)

    async def complete(self, prompt: Prompt, params: SamplingParams, **options: Any) -> Output:
        """The whole answer."""
        stream = self.open(prompt, params, **options)
        try:
            return await stream.whole()
        finally:
            self.abort(stream.id)

    async def generate(self, prompts: Sequence[Prompt], params: Params, **options: Any) -> list[Output]:
        """The whole answer to each prompt; `params` are for all or one a prompt. When some fail the others are ended,
        and the first failure is raised."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UserError(
                f"{len(prompts)} prompts and {len(each)} settings: give one of them a prompt, or one for all"
            )
        streams: list[Stream] = []
        try:
            for prompt, own in zip(prompts, each, strict=True):
                streams.append(self.open(prompt, own, **options))
            return [await stream.whole() for stream in streams]
        finally:
            for stream in streams:
                self.abort(stream.id)

    def open(
        self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None, priority: int = 0,
        deadline_s: float | None = None, tenant: str = "", constraint: Constrained | None = None,
        keep: Collection[str] = (),
    ) -> "Stream":  # fmt: skip
        """Ask, from a coroutine. Raises UserError for what cannot be served; `deadline_s` is seconds from now.

        `constraint` is what `Grammars.compile` gave: the answer has that form, or ends with "length". `keep` are
        special tokens whose texts are wanted in the answer's: marks of tool calls.
        """
        if self.dead is not None:
            raise EngineDead(str(self.dead))
        self.warm_up()
        ids = self.ids(prompt)
        check_request(
            ids, params, self.config.vocab_size, self.limits.max_length, tokenizer=self.tokenizer is not None
        )
        now, name = self._clock(), request_id or f"request-{next(self._numbers)}"
        if name in self._open:
            raise UserError(f"request id {name!r} is in use: leave it out, or give each request its own")
        ends, matching = params.ends(self.end_ids), None
        if constraint is not None:
            matching = constraint.start(params, ends, self.config.vocab_size)
            # The grammar sees to both: an end may be all that it has left.
            params = dataclasses.replace(params, min_tokens=0, ignore_eos=False)
            ends = params.ends(self.end_ids)
        request = Request(
            id=name, prompt=ids, max_tokens=params.max_tokens, arrived=now, priority=priority,
            deadline=None if deadline_s is None else now + deadline_s, tenant=tenant,
            # Rotation that depends on a prompt's length makes other keys of the same tokens.
            adapter=f"of {len(ids)}" if self._by_length else "",
            use_cache=params.prompt_logprobs is None, stepwise=matching is not None,
            params=Asked(params, tuple(sorted(ends)), matching),
        )  # fmt: skip
        answer = Answer(name, ids, params, self.tokenizer, self.end_ids, keep)
        stream = self._open[name] = Stream(answer, asyncio.get_running_loop())
        self._loop.submit(request)
        if self.dead is not None:  # it has stopped meanwhile, and looks at nothing any more
            self._open.pop(name, None)
            raise EngineDead(str(self.dead))
        return stream

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        """A prompt as tokens: text as the start of a document."""
        if not isinstance(prompt, str):
            return tuple(prompt)
        if self.tokenizer is None:
            raise UserError("a prompt is text, and the engine has no tokenizer: give it one, or token ids")
        return tuple(prompt_ids(self.tokenizer, prompt))

    def abort(self, request_id: str) -> None:
        """End a request; nothing where it is over."""
        stream = self._open.pop(request_id, None)
        if stream is not None and not stream.answer.done:
            self._loop.cancel(request_id, "cancelled")
            stream.take(News(request_id, finish="cancelled"))

    def close(self) -> None:
        """Stop working; requests that are not over fail with EngineDead."""
        self._loop.stop()
        if self._thread.ident and self._thread is not threading.current_thread():
            self._thread.join()

    def _deliver(self, news: list[News]) -> None:
        """Called by the engine's thread: news to the event loops of those who asked, one call for all of a loop's."""
        by_loop: dict[asyncio.AbstractEventLoop, list[News]] = {}
        for each in news:
            if (stream := self._open.get(each.id)) is not None:
                by_loop.setdefault(stream.loop, []).append(each)
        for loop, own in by_loop.items():
            try:
                loop.call_soon_threadsafe(self._hear, own)
            except RuntimeError:  # the loop is closed: nobody waits for these any more
                for each in own:
                    self._open.pop(each.id, None)
                    self._loop.cancel(each.id, "cancelled")

    def _hear(self, news: list[News]) -> None:
        for each in news:
            if (stream := self._open.get(each.id)) is None:
                continue
            stream.take(each)
            if stream.answer.done:
                del self._open[each.id]
                if each.finish is None:  # a stop string, which the device does not know
                    self._loop.cancel(each.id, "stop")


class Stream:
    """One request's answer, as its event loop sees it."""

    def __init__(self, answer: Answer, loop: asyncio.AbstractEventLoop):
        self.answer, self.loop = answer, loop
        self._new: deque[Delta] = deque()
        self._waiting: asyncio.Future[None] | None = None
        self._wants_all = False

    @property
    def id(self) -> str:
        """The request's."""
        return self.answer.output.id

    def take(self, news: News) -> None:
        """Take in news, in the event loop."""
        delta = self.answer.take(news)
        if not self._wants_all:
            self._new.append(delta)
        if (
            self._waiting is not None
            and not self._waiting.done()
            and (self.answer.done or not self._wants_all)
        ):
            self._waiting.set_result(None)

    async def next(self) -> Delta:
        """What was added since the last call, all of it: a slow reader gets larger pieces. Raises the request's
        error where it failed."""
        await self._until(lambda: bool(self._new) or self.answer.done)
        whole = Delta()
        while self._new:
            whole.add(self._new.popleft())
        if self.answer.error is not None:
            raise self.answer.error
        return whole

    async def whole(self) -> Output:
        """The answer when it is done. Raises the request's error where it failed."""
        self._wants_all = True
        await self._until(lambda: self.answer.done)
        if self.answer.error is not None:
            raise self.answer.error
        return self.answer.output

    async def _until(self, so: Callable[[], bool]) -> None:
        while not so():
            self._waiting = self.loop.create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None


class Engine:
    """`AsyncEngine` for code that is not async: the same, with an event loop of its own in a thread."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer | None = None, **options: Any):
        """`options` are those of `AsyncEngine`."""
        self.asynchronous = AsyncEngine(model, tokenizer, **options)
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever, name="maxstack-answers", daemon=True)
        self._thread.start()

    def warm_up(self) -> None:
        """Compile everything, and begin to work."""
        self.asynchronous.warm_up()

    def generate(
        self, prompts: Sequence[Prompt], params: Params | None = None, **options: Any
    ) -> list[Output]:
        """The whole answer to each prompt; `params` are for all or one a prompt."""
        params = SamplingParams() if params is None else params
        return self._wait(self.asynchronous.generate(prompts, params, **options))

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Iterator[Delta]:
        """The answer piece by piece."""
        pieces = self.asynchronous.stream(prompt, params or SamplingParams(), **options)
        try:
            while True:
                try:
                    yield self._wait(pieces.__anext__())
                except StopAsyncIteration:
                    return
        finally:
            self._wait(pieces.aclose())

    def abort(self, request_id: str) -> None:
        """End a request."""
        self._events.call_soon_threadsafe(self.asynchronous.abort, request_id)

    def close(self) -> None:
        """Stop working, and let go of the threads."""
        self.asynchronous.close()
        if not self._events.is_closed():
            self._events.call_soon_threadsafe(self._events.stop)
            self._thread.join()
            self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait[T](self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._events)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise


def scales_by_length(config: TransformerConfig) -> bool:
    """Whether some layer's rotation depends on how long a document is."""
    tables = [table for s in config.stacks for block in s.pattern for table in block.attention.rope_tables()]
    return any(rope.scaling in BY_LENGTH for rope, _ in tables)
