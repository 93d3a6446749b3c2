"""The loop that keeps the device busy: plans made and results handed out while it works."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from maxstack.serve.compiled import Compilations
from maxstack.serve.constrain.matching import Matching
from maxstack.serve.device import Device
from maxstack.serve.errors import ConstraintFailed, EngineDead, RequestFailed
from maxstack.serve.news import News, Progress, failure
from maxstack.serve.pace import Pace
from maxstack.serve.request import Event, Full, Refused, Request
from maxstack.serve.results import Found, Launched
from maxstack.serve.scheduler import Scheduler
from maxstack.serve.swapping import Swap, SwapFailed

log = logging.getLogger(__name__)

# What a step may fail with: jax's own errors are RuntimeErrors. Anything else is a fault of ours and ends the engine.
STEP_ERRORS = (RuntimeError, ValueError, MemoryError, OSError)
NAP_S = 0.01
"""Wait before asking the scheduler again when it has work but nothing to run."""


class Loop:
    """Owns scheduler and device. `submit` and `cancel` may be called from any thread, `turn` and `run` from one."""

    def __init__(
        self,
        device: Device,
        scheduler: Scheduler,
        deliver: Callable[[list[News]], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.device, self.scheduler = device, scheduler
        self.progress, self.compilations = Progress(), Compilations()
        self.dead: BaseException | None = None
        self._deliver, self._clock = deliver, clock
        self._inbox: queue.SimpleQueue[Callable[[], list[News]] | None] = queue.SimpleQueue()
        self._under_way: deque[Launched] = deque()
        self._known: set[str] = set()
        self._bound: dict[str, Matching] = {}
        self._swap: Swap | None = None
        self.pace: Pace | None = None
        self._stopped = threading.Event()

    @property
    def has_work(self) -> bool:
        """Whether somebody waits for something; any thread may ask."""
        return bool(self._known) or not self._inbox.empty()

    def submit(self, request: Request) -> None:
        """Queue a request; what becomes of it is delivered."""
        self._inbox.put(lambda: self._add(request))

    def cancel(self, request_id: str, reason: str) -> None:
        """End a request, for a reason that is delivered as its finish; nothing where it is over already."""
        self._inbox.put(lambda: self._cancel(request_id, reason))

    def call(self, function: Callable[[], None]) -> "Future[None]":
        """Have the engine's thread do something between two plans."""
        future: Future[None] = Future()

        def run() -> list[News]:
            try:
                found = function()
            except BaseException as error:
                # Whoever asked is told of any; by what is no step's fault this thread ends.
                if not future.done():
                    future.set_exception(error)
                if not isinstance(error, STEP_ERRORS):
                    raise
            else:
                if not future.done():
                    future.set_result(found)
            return []

        self._inbox.put(run)
        if self.dead is not None and not future.done():
            future.set_exception(EngineDead(str(self.dead)))
        return future

    def swap(self, leaves: list[Any], within_s: float | None) -> "Future[None]":
        """Have other weights put in place as soon as all that has begun is over; what has not begun waits for it."""
        until = None if within_s is None else self._clock() + within_s
        swap = Swap(lambda: self.device.put_weights(leaves), until)

        def begin() -> None:
            if self._swap is not None:
                raise RuntimeError("other weights are waiting to be put in place already; try again later")
            self._swap, self.scheduler.holding = swap, True

        refused = self.call(begin)
        refused.add_done_callback(lambda begun: copied(begun.exception(), swap.done))
        return swap.done

    def _exchange(self) -> None:
        """Put other weights in place where they can be, or give up."""
        swap = self._swap
        if swap is None:
            return
        fault: Exception | None = None
        if self.scheduler.started or self._under_way:
            if swap.until is None or self._clock() < swap.until:
                return
            fault = SwapFailed("requests on the old weights are not over yet; the old weights stay")
        self._swap, self.scheduler.holding = None, False
        if fault is None:
            try:
                swap.exchange()
                self.scheduler.forget_prefixes()
            except STEP_ERRORS as error:
                fault = error
        if fault is None:
            swap.done.set_result(None)
        else:
            swap.done.set_exception(fault)

    def stop(self) -> None:
        """Have `run` return; requests that are not over fail."""
        self._stopped.set()
        self._inbox.put(None)

    def fail(self, error: Exception, asked: list[str]) -> None:
        """End for a reason that the engine's thread may never learn, as it waits for the device; `asked` are the
        requests that are open, taken in or not. Any thread."""
        self.dead = self.dead or error
        self.stop()
        self._deliver([News(request_id, finish="error", error=error) for request_id in asked])

    def run(self) -> None:
        """Work until stopped."""
        error: BaseException = EngineDead("the engine was closed")
        try:
            with self.compilations.counted():
                while not self._stopped.is_set():
                    if not self.turn():
                        self._wait()
        except BaseException as fault:
            log.exception("the engine has stopped")
            error = EngineDead(f"the engine has stopped: {type(fault).__name__}: {fault}")
            raise
        finally:
            self.dead = self.dead or error
            self._answer_all(self.dead)

    def turn(self) -> bool:
        """Take in what came, launch a plan, collect the results of the oldest; False if there was nothing to do."""
        self._take_in()
        self._exchange()
        try:
            return self._step()
        except STEP_ERRORS as error:
            log.exception("a step has failed; the cache is made anew, and requests are read again")
            self._recover(f"{type(error).__name__}: {error}")
            return True

    def _step(self) -> bool:
        plan = self.scheduler.plan(self._clock())
        if plan is not None:
            self._under_way.append(self.device.launch(plan))
            if self.progress.busy_since is None:
                self.progress.busy_since = self._clock()
        collect = bool(self._under_way) and (
            plan is None or len(self._under_way) >= self.scheduler.limits.ahead
        )
        if collect:
            self._collect()
        elif events := self.scheduler.events():
            self._tell(self._news(events, Found()))
        return plan is not None or collect

    def _collect(self) -> None:
        launched = self._under_way[0]
        found = self.device.results(launched)
        self._under_way.popleft()
        now = self._clock()
        events = self.scheduler.done(launched.plan, found.results, now)
        if launched.plan.drafts:
            self._learn(launched.plan.drafts, *found.guessed)
        events += self._follow(events, now)
        progress = self.progress
        progress.steps += 1
        progress.failed = 0
        progress.busy_s += progress.stuck_for(now)
        progress.busy_since = now if self._under_way else None
        self._tell(self._news(events, found))

    def _follow(self, events: list[Event], now: float) -> list[Event]:
        """Bound answers go on in their grammars, while the device works; what that ends is told.

        A grammar knows the tokens that callers were told of and no others, so that nothing is to be undone when rows
        are preempted or steps fail.
        """
        for event in events:
            matching = self._bound.get(event.id)
            if matching is None or event.finish is not None:
                continue
            matching.take(event.tokens)
            if matching.fault is not None:
                self.scheduler.cancel(event.id, "error", now)
            elif matching.over:
                self.scheduler.cancel(event.id, "stop", now)
        return self.scheduler.events()

    def _learn(self, drafts: int, row_steps: int, tokens: int) -> None:
        counters = self.scheduler.counters
        counters.spec_decode_num_draft_tokens += drafts * row_steps
        counters.spec_decode_num_accepted_tokens += tokens - row_steps
        if self.pace is not None:
            self.pace.learn(row_steps, tokens)

    def _news(self, events: list[Event], found: Found) -> list[News]:
        told = []
        for event in events:
            error = self._error(event) if event.finish == "error" else None
            logprobs = found.logprobs.get(event.id)
            if logprobs is not None:
                logprobs = logprobs[len(logprobs) - len(event.tokens) :]  # those said again come first
            prompt, pooled = found.prompts.pop(event.id, None), found.pooled.pop(event.id, None)
            told.append(
                News(
                    event.id,
                    event.tokens,
                    logprobs,
                    prompt,
                    pooled,
                    event.finish,
                    error,
                    event.cached,
                    event.admitted,
                )
            )
        # Of prompts that were read in part, with no token yet.
        told += [News(request_id, prompt=prompt) for request_id, prompt in found.prompts.items()]
        told += [News(request_id, pooled=part) for request_id, part in found.pooled.items()]
        return told

    def _error(self, event: Event) -> RequestFailed:
        matching = self._bound.get(event.id)
        if event.error is None and matching is not None and matching.fault is not None:
            return ConstraintFailed(matching.fault)
        return failure(event.error)

    def _recover(self, error: str) -> None:
        """After a failed step, which may have taken the cache along: all of it is made anew."""
        self._under_way.clear()
        self.progress.busy_since = None
        self.progress.failed += 1
        self.device.reset()
        self._tell(self._news(self.scheduler.lost(self._clock(), error), Found()))

    def _take_in(self) -> None:
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            if command is not None:
                self._tell(command())

    def _wait(self) -> None:
        """Rest until something comes, or, where the scheduler has work that cannot run yet, for a moment."""
        try:
            command = self._inbox.get(timeout=None if self.scheduler.idle else NAP_S)
        except queue.Empty:
            return
        if command is not None:
            self._tell(command())

    def _add(self, request: Request) -> list[News]:
        try:
            self.scheduler.add(request)
        except (Full, Refused) as error:
            return [News(request.id, finish="error", error=error)]
        self._known.add(request.id)
        if request.params.matching is not None:
            self._bound[request.id] = request.params.matching
        return []

    def _cancel(self, request_id: str, reason: str) -> list[News]:
        self.scheduler.cancel(request_id, reason, self._clock())
        return self._news(self.scheduler.events(), Found())

    def _tell(self, news: list[News]) -> None:
        if news:
            over = {each.id for each in news if each.finish is not None}
            self._known -= over
            for request_id in over & self._bound.keys():
                del self._bound[request_id]
            self._deliver(news)

    def _answer_all(self, error: BaseException) -> None:
        """Requests that are not over, and those that have just come, fail."""
        failed = error if isinstance(error, Exception) else EngineDead(str(error))
        try:
            self._take_in()
        finally:
            if self._swap is not None:
                self._swap.done.set_exception(failed)
            self._tell([News(request_id, finish="error", error=failed) for request_id in self._known])


def copied(error: BaseException | None, future: "Future[None]") -> None:
    """Let a future fail as another one did, if it did."""
    if error is not None:
        future.set_exception(error)
