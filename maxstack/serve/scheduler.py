"""Who runs next, on which pages: continuous batching decided on the host, one plan at a time.

No clock and no chance in here: the same calls give the same plans. `books` holds what is known, `planning` makes the
plans; here requests come and go, and results come in.
"""

from bisect import insort
from collections.abc import Mapping
from heapq import heappop, heappush

from maxstack.serve.books import ORDER, Entry
from maxstack.serve.counters import Counters
from maxstack.serve.plan import Plan
from maxstack.serve.planning import Planning
from maxstack.serve.request import Event, Full, Refused, Request, Result
from maxstack.serve.sequence import Sequence
from maxstack.serve.timing import time_tokens


class Scheduler(Planning):
    """Requests in, plans out, results in, events out. One thread calls it.

    `plan` may be called while earlier plans are under way; `done` takes their results in the order of the plans.
    """

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises Refused if it can never be served (the message has the numbers) or its id is in use, and Full with
        `retry_after` seconds if too many wait.
        """
        problem = self._problem(request)
        if problem is not None:
            self._count(self._counters.admission_rejections, "refused")
            raise Refused(f"request {request.id}: {problem}")
        self._refuse_when_full(request)
        self._serial += 1
        order = request.arrived - request.priority * self.limits.level_s, self._serial
        sequence = Sequence(request, order, self.prefix.salt(request.tenant, request.adapter))
        self._sequences[request.id] = sequence
        insort(self._waiting, sequence, key=ORDER)
        if request.deadline is not None:
            heappush(self._deadlines, (request.deadline, order, request.id))

    def _refuse_when_full(self, request: Request) -> None:
        waiting, whose, most = len(self._waiting), "", self.limits.waiting
        own_most = self.limits.waiting_a_tenant
        if waiting < most and own_most is not None:
            own = sum(sequence.request.tenant == request.tenant for sequence in self._waiting)
            waiting, whose, most = own, " of this tenant", own_most
        if waiting >= most:
            self._count(self._counters.admission_rejections, "full")
            raise Full(waiting, self._retry_after(request.arrived), whose)

    def cancel(self, request_id: str, reason: str = "cancelled", now: int | float | None = None) -> bool:
        """End a request wherever it is; its pages are free at once, or when plans under way no longer touch them.

        False if there is no such request any more. A stop string found on the host is `cancel(id, "stop", now)`; its
        times are counted if `now` is given.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._finish(sequence, reason, now)
        self._tell(sequence, finish=reason)
        return True

    def events(self) -> list[Event]:
        """What happened since the last `done` or `events`: cancelled requests, deadlines."""
        events, self._events = self._events, []
        return events

    @property
    def idle(self) -> bool:
        """Nothing waits, runs or is under way."""
        return not self._sequences and not self._under_way

    @property
    def started(self) -> bool:
        """Whether some request has begun and is not over: it runs, or waits for its pages to come back."""
        return bool(self._running) or any(sequence.cached >= 0 for sequence in self._waiting)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache: its keys and values are of other weights."""
        self.prefix.clear()

    @property
    def counters(self) -> Counters:
        """The numbers, up to date."""
        self._counters.num_requests_running = len(self._running)
        self._counters.num_requests_waiting = len(self._waiting)
        self._counters.kv_cache_usage_perc = 1 - self.pages.available / self.pages.count
        self._counters.prefix_cache_collisions = self.prefix.collisions
        return self._counters

    def _problem(self, request: Request) -> str | None:
        """Why it can never be served."""
        if request.id in self._sequences:
            return "this id is in use"
        limits, prompt = self.limits, len(request.prompt)
        total = prompt + request.max_tokens
        if total > limits.max_length:
            return (
                f"a prompt of {prompt} tokens and max_tokens {request.max_tokens} are {total} tokens, "
                f"more than the {limits.max_length} of this server; shorten one of them"
            )
        # The last token is sampled but never fed, so it takes no place; a prompt that is only read takes all.
        needed = -(-max(prompt, total - 1) // limits.page)
        if needed > limits.pages:
            return (
                f"{total} tokens take {needed} pages of {limits.page} tokens, more than the {limits.pages} that the "
                f"cache has; shorten the prompt or max_tokens"
            )
        return None

    def _retry_after(self, now: int | float) -> float:
        """Seconds until half of the queue is gone at the pace of the last admissions, between 1 and 60."""
        if len(self._admissions) < 2:
            return 1.0
        pace = (now - self._admissions[0]) / len(self._admissions)
        return min(max(pace * len(self._waiting) / 2, 1.0), 60.0)

    def plan(self, now: int | float) -> Plan | None:
        """The next plan; None if there is nothing to run, or if `Limits.ahead` plans are under way."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, order, request_id = heappop(self._deadlines)
            sequence = self._sequences.get(request_id)
            if sequence is not None and sequence.order == order:
                self.cancel(request_id, "deadline", now)
        if len(self._under_way) >= self.limits.ahead:
            return None
        batch = self._batch(now)
        if not batch.decodes and not batch.chunks:
            return None
        return self._made(batch, 1 if batch.chunks else self._stretch(batch))

    def done(self, plan: Plan, results: Mapping[int, Result], now: int | float) -> list[Event]:
        """Take the results of the oldest plan under way, by row, and say what they mean for the requests.

        Results of requests that ended since the plan was made, or were preempted and started again, are dropped.
        Raises ValueError for a plan out of turn and for a row whose result is missing or of impossible length.
        """
        if not self._under_way or self._under_way[0][0] is not plan:
            raise ValueError(
                f"plan {plan.number} is not the oldest under way ({[p.number for p, _ in self._under_way]})"
            )
        _, entries = self._under_way[0]
        checked = [(entry, self._result(plan, entry, results)) for entry in entries]
        self._under_way.popleft()
        for entry, result in checked:
            sequence = entry.sequence
            if sequence.finished or sequence.epoch != entry.epoch:
                self._counters.plan_tokens_dropped += len(result.tokens)
            else:
                sequence.pending -= entry.gain
                self._take(sequence, entry, result, now)
        self.pages.plan_done(plan.number)
        return self.events()

    def _result(self, plan: Plan, entry: Entry, results: Mapping[int, Result]) -> Result:
        """A row's result, refused if it cannot be one; there may be none where the request is over meanwhile."""
        result = results.get(entry.row, Result())
        if entry.sequence.finished or entry.sequence.epoch != entry.epoch:
            return result
        count = len(result.tokens)
        whole = bool(entry.gain) if self.limits.drafts else entry.gain
        if count > entry.gain or (count < whole and not result.ended and result.error is None):
            raise ValueError(
                f"plan {plan.number}, row {entry.row}: {count} tokens came, {entry.gain} were planned, and the row "
                f"has neither ended nor failed"
            )
        return result

    def _take(self, sequence: Sequence, entry: Entry, result: Result, now: int | float) -> None:
        """New tokens of a live sequence. One that was preempted meanwhile keeps them: they were computed before."""
        request = sequence.request
        if result.error is not None:
            for page in sequence.pages:  # whatever spoiled them must not spoil others
                self.prefix.forget(page)
            sequence.named = -1
            self._finish(sequence, "error", now)
            self._tell(sequence, finish="error", error=result.error)
            return
        again = min(sequence.replay, len(result.tokens))
        sequence.replay -= again
        self._counters.replayed_tokens += again
        tokens = result.tokens[again:]
        sequence.tokens += tokens
        if tokens:
            time_tokens(self._counters, sequence, len(tokens), now)
        if sequence.row is not None and len(sequence.tokens) > (sequence.named + 1) * self.limits.page:
            self._name_pages(sequence)
        finish = None
        if result.ended:
            finish = "stop"
        elif entry.over or (request.max_tokens and sequence.generated == request.max_tokens):
            finish = "length"
        if finish is not None:
            self._finish(sequence, finish, now)
        if tokens or finish is not None:
            self._tell(sequence, tokens, finish=finish)

    def lost(self, now: int | float, error: str) -> list[Event]:
        """A step failed, and with it went the cache that it was given: start again what was running.

        Plans under way are void, every page is free, the prefix cache is empty. Requests that run when this happens
        for the `retries + 1`-th time end with the reason "error".
        """
        self._counters.cache_losses += 1
        for plan, _ in tuple(self._under_way):
            self.pages.plan_done(plan.number)
        self._under_way.clear()
        self.prefix.clear()
        for sequence in tuple(self._running):
            self._leave(sequence)
            sequence.losses += 1
            insort(self._waiting, sequence, key=ORDER)
        for sequence in tuple(self._waiting):
            sequence.epoch += 1
            sequence.pending = 0
            if sequence.losses > self.limits.retries:
                self._finish(sequence, "error", now)
                self._tell(sequence, finish="error", error=error)
        return self.events()
