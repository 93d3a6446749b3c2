"""A model that answers many at once, for async code; `blocking.Engine` is for any other."""

import asyncio
import dataclasses
import itertools
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

import jax

from maxstack.config import UserError
from maxstack.data.tokenizer import Tokenizer
from maxstack.kernels.paged_attention import PageType
from maxstack.models.adapters import Adapter, AdapterSlots
from maxstack.models.generate import prompt_ids
from maxstack.models.generation.checks import check_request
from maxstack.models.generation.params import SamplingParams
from maxstack.models.rope import BY_LENGTH
from maxstack.models.transformer import Transformer, TransformerConfig
from maxstack.serve import choices, rooms, swapping
from maxstack.serve.adapters import Adapters
from maxstack.serve.constrain.matching import Compiled as Constrained
from maxstack.serve.constrain.matching import left_to_the_engine
from maxstack.serve.device import Asked, Device
from maxstack.serve.drafter import Drafter
from maxstack.serve.embedding import Embedding, Pool, embed
from maxstack.serve.errors import EngineDead
from maxstack.serve.forms import form_for
from maxstack.serve.hosts.leader import Leader
from maxstack.serve.invariant import check_rows, needed
from maxstack.serve.loop import Loop
from maxstack.serve.news import News, Progress
from maxstack.serve.output import Answer, Delta, Output
from maxstack.serve.pace import Pace
from maxstack.serve.plan import Limits
from maxstack.serve.request import Request
from maxstack.serve.scheduler import Scheduler
from maxstack.serve.sizes import limits_for
from maxstack.serve.stream import Stream
from maxstack.sharding import mesh_of

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
        adapters: AdapterSlots | None = None,
        draft: Transformer | None = None,
        invariant: bool = False,
        leader: Leader | None = None,
        use_up: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`limits` are by default what fits this machine; `kv_dtype` is the type of the cache's numbers, by default
        the model's compute type. `end_ids` end an answer (by default the tokenizer's `stop_ids`). `on` is the platform
        whose form of the programs is used: that at hand, unless told otherwise. `buckets` are the numbers of rows that
        decode steps are compiled for, by default powers of two and all rows. `adapters` is the room for adapters:
        none by default, and then they cost nothing. With `limits.drafts` tokens are guessed, from what a row has said,
        or by the small model `draft`. `invariant` makes answers the same to the last bit in any company: where C++ does
        so anyhow it changes nothing, elsewhere it sets `Limits.invariant`, and `buckets` are not used. `leader` has
        links to processes that hold their parts of the model; the engine ends with them. `use_up` lets the
        model's own arrays be deleted where the engine has a copy."""
        self.config, self.tokenizer = model.config, tokenizer
        kv_dtype = model.config.dtype if kv_dtype is None else kv_dtype
        invariant = invariant and needed(model, on, adapters)
        self.limits = limits_for(model, kv_dtype, on, draft, invariant) if limits is None else limits
        if invariant:
            self.limits = dataclasses.replace(self.limits, invariant=True)
        self.on = on
        form, weights = form_for(model, on, adapters, use_up)
        drafter = (
            None if draft is None else Drafter(draft, model.config, self.limits, kv_dtype, on, mesh_of(model))
        )
        device = Device(model.config, form, weights, self.limits, kv_dtype, buckets, drafter)
        self._loop = Loop(device, Scheduler(self.limits), self._deliver, clock)
        self.adapters = Adapters(adapters, model.config, rooms.names(model, adapters), self._put_adapter)
        """Loads and unloads adapters by name."""
        self._leader = leader
        if leader is not None:
            if invariant:
                raise ValueError("invariant: several processes cannot try their rows yet; serve with one")
            leader.say_limits(dataclasses.asdict(self.limits))
            leader.on_lost = lambda why: self._loop.fail(EngineDead(why), list(self._open))
        self._thread = threading.Thread(target=self._work, name="maxstack-engine", daemon=True)
        self._clock, self._numbers = clock, itertools.count()
        self._open: dict[str, Stream] = {}
        default = () if tokenizer is None else tokenizer.stop_ids
        self.end_ids = frozenset(default if end_ids is None else end_ids)
        self._by_length = scales_by_length(model.config)
        self.observer: Observer | None = None

    def warm_up(self, told: Callable[[int, int], None] | None = None) -> None:
        """Compile everything, and begin to work. `stream` and the like do it first where nobody has. `told` hears
        how many programs are compiled, and of how many."""
        if not self._thread.ident:
            self._loop.device.warm_up(told)
            if self._leader is not None:
                self._loop.device.lead(self._leader)
            if self.limits.invariant:
                check_rows(self._loop.device)
            if self.limits.drafts:
                pace = self._loop.pace = Pace(self.limits.drafts, self._loop.device.costs())
                self._loop.scheduler.drafting = pace.drafts_for
            self._thread.start()

    def _work(self) -> None:
        """What the engine's thread does. Where it fails, those that follow are told: they wait for it."""
        try:
            self._loop.run()
        except BaseException as error:
            if self._leader is not None:
                self._leader.lose(f"the engine has stopped: {type(error).__name__}: {error}")
            raise

    @property
    def progress(self) -> Progress:
        """What a watchdog looks at."""
        return self._loop.progress

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights on the device."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._loop.device.weights))

    @property
    def has_work(self) -> bool:
        """Whether some request is not over yet."""
        return self._loop.has_work

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

    def open_choices(
        self, prompt: Prompt, params: SamplingParams, n: int = 1, **options: Any
    ) -> list[Stream]:
        """`n` answers to one prompt, which is read once; `options` as in `open`. See `choices.open_choices`."""
        return choices.open_choices(self, prompt, params, n, **options)

    async def best_of(
        self, prompt: Prompt, params: SamplingParams, n: int, best_of: int, **options: Any
    ) -> list[Output]:
        """The `n` likeliest of `best_of` answers, the likeliest first."""
        return await choices.choose(self, prompt, params, n, best_of, **options)

    async def score(self, prompt: Prompt, most: int = 0, **options: Any) -> Output:
        """The prompt's log-probabilities (`prompt_logprobs`); nothing is generated."""
        return await choices.score(self, prompt, most, **options)

    async def swap_weights(self, model: Transformer, within_s: float | None = None) -> None:
        """Serve other weights of the same shapes: requests that have begun finish on the old ones, others wait."""
        if self._leader is not None:
            raise UserError(
                "weights are not exchanged where several processes hold them: start the server again"
            )
        self.warm_up()
        await swapping.swap_weights(self, model, within_s)

    @property
    def leaves(self) -> list[jax.Array]:
        """The weights as the device has them."""
        return self._loop.device.leaves

    async def embed(self, prompt: Prompt, pooling: str = "mean", **options: Any) -> Embedding:
        """The prompt as a vector."""
        return await embed(self, prompt, pooling, **options)

    def open(
        self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None, priority: int = 0,
        deadline_s: float | None = None, tenant: str = "", adapter: str | None = None,
        pooling: str | None = None, constraint: Constrained | None = None, keep: Collection[str] = (),
    ) -> Stream:  # fmt: skip
        """Ask, from a coroutine. Raises UserError for what cannot be served; `deadline_s` is seconds from now.

        With max_tokens 0 the prompt is only read, for its log-probabilities or, with `pooling`, for its embedding.
        `constraint` is what `Grammars.compile` gave: the answer has that form, or ends with "length". `keep` are
        special tokens whose texts are wanted in the answer's: marks of tool calls.
        """
        if self.dead is not None:
            raise EngineDead(str(self.dead))
        self.warm_up()
        ids = self.ids(prompt)
        check_request(
            ids, params, self.config.vocab_size, self.limits.max_length, tokenizer=self.tokenizer is not None,
            least=0,
        )  # fmt: skip
        now, name = self._clock(), request_id or f"request-{next(self._numbers)}"
        if name in self._open:
            raise UserError(f"request id {name!r} is in use: leave it out, or give each request its own")
        matching = None
        if constraint is not None:
            matching = constraint.start(params, self.end_ids, self.config.vocab_size)
            params = left_to_the_engine(params)
        held = None if adapter is None else self.adapters.take(adapter)
        # Rotation that depends on a prompt's length makes other keys of the same tokens.
        salt = ("" if held is None else held.salt) + (f" of {len(ids)}" if self._by_length else "")
        asked = Asked(
            params, tuple(sorted(params.ends(self.end_ids))), pooled=pooling is not None,
            adapter=0 if held is None else held.number, matching=matching,
        )  # fmt: skip
        try:
            request = Request(
                id=name, prompt=ids, max_tokens=params.max_tokens, arrived=now, priority=priority,
                deadline=None if deadline_s is None else now + deadline_s, tenant=tenant, adapter=salt,
                use_cache=params.prompt_logprobs is None and pooling != "mean",
                stepwise=matching is not None, params=asked,
            )  # fmt: skip
        except ValueError:
            if held is not None:
                self.adapters.release(held)
            raise
        pool = None if pooling is None else Pool(pooling)
        answer = Answer(name, ids, params, self.tokenizer, self.end_ids, pool, keep)
        stream = self._open[name] = Stream(answer, asyncio.get_running_loop(), self._clock, held)
        self._loop.submit(request)
        if self.dead is not None:  # it has stopped meanwhile, and looks at nothing any more
            self._forget(name)
            raise EngineDead(str(self.dead))
        if self.observer is not None:
            self.observer.opened(stream)
        return stream

    def _forget(self, request_id: str) -> Stream | None:
        """Out of the books; the adapter that it used may go."""
        stream = self._open.pop(request_id, None)
        if stream is not None and stream.adapter is not None:
            self.adapters.release(stream.adapter)
        return stream

    def _put_adapter(self, slot: int, adapter: Adapter) -> "Future[None]":
        self.warm_up()
        fitted = self._loop.device.fitted(adapter)
        return self._loop.call(lambda: self._loop.device.put_adapter(slot, fitted))

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        """A prompt as tokens: text as the start of a document."""
        if not isinstance(prompt, str):
            return tuple(prompt)
        if self.tokenizer is None:
            raise UserError("a prompt is text, and the engine has no tokenizer: give it one, or token ids")
        return tuple(prompt_ids(self.tokenizer, prompt))

    def abort(self, request_id: str) -> None:
        """End a request; nothing where it is over."""
        stream = self._forget(request_id)
        if stream is not None and not stream.answer.done:
            self._loop.cancel(request_id, "cancelled")
            stream.take(News(request_id, finish="cancelled"))

    def close(self) -> None:
        """Stop working; requests that are not over fail with EngineDead."""
        self._loop.stop()
        if self._thread.ident and self._thread is not threading.current_thread():
            self._thread.join()
        if self._leader is not None:
            self._leader.end()

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
                    self._forget(each.id)
                    self._loop.cancel(each.id, "cancelled")

    def _hear(self, news: list[News]) -> None:
        for each in news:
            if (stream := self._open.get(each.id)) is None:
                continue
            stream.take(each)
            if stream.answer.done:
                self._forget(each.id)
                if each.finish is None:  # a stop string, which the device does not know
                    self._loop.cancel(each.id, "stop")


@runtime_checkable
class Observer(Protocol):
    """Hears of every request, in the event loop of whoever asks."""

    def opened(self, stream: "Stream") -> None:
        """It was asked for, in the context of the caller."""


def scales_by_length(config: TransformerConfig) -> bool:
    """Whether some layer's rotation depends on how long a document is."""
    tables = [table for s in config.stacks for block in s.pattern for table in block.attention.rope_tables()]
    return any(rope.scaling in BY_LENGTH for rope, _ in tables)
