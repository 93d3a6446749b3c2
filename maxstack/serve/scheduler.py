"""Who runs next, on which pages: continuous batching decided on the host, one plan at a time.

The order of requests never changes: by arrival, a level of priority counting as `Limits.level_s` seconds. It decides
who is admitted first, who is read first, and, from its other end, who gives up pages when there are none left. So the
first in order always makes progress, and everybody is first some day. No clock and no chance in here: the same calls
give the same plans.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping
from heapq import heappop, heappush
from operator import attrgetter
from typing import NamedTuple

from maxstack.serve.batch import Batch, best_shape, fitting_shape, steps_for
from maxstack.serve.counters import Counters
from maxstack.serve.pages import Pages
from maxstack.serve.plan import Chunk, Decode, Limits, Plan, Start, Table
from maxstack.serve.prefix import Node, Prefix
from maxstack.serve.request import Event, Full, Refused, Request, Result
from maxstack.serve.sequence import Sequence

ORDER = attrgetter("order")
PACE = 32  # recent admissions that the estimate of the waiting time looks at


class Entry(NamedTuple):
    """A row of a plan under way."""

    sequence: Sequence
    epoch: int
    row: int
    gain: int
    """Tokens at most."""
    over: bool
    """Nothing is to be generated: the request ends with this chunk."""


class Scheduler:
    """Requests in, plans out, results in, events out. One thread calls it.

    `plan` may be called while earlier plans are under way; `done` takes their results in the order of the plans.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.pages = Pages(limits.pages)
        self.prefix = Prefix(self.pages, limits.page)
        self._counters = Counters()
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # in order
        self._running: list[Sequence] = []  # in order
        self._free_rows = list(range(limits.rows))  # a heap
        self._under_way: deque[tuple[Plan, list[Entry]]] = deque()
        self._promised: dict[bytes, Sequence] = {}  # keys of pages that a reading sequence will fill
        self._deadlines: list[tuple[float, tuple[float, int], str]] = []  # a heap
        self._admissions: deque[float] = deque(maxlen=PACE)
        self._events: list[Event] = []
        self._numbers = 0  # plans made
        self._serial = 0  # requests taken

    # ------------------------------------------------------------------------------------- requests come and go
    def add(self, request: Request) -> None:
        """Queue a request.

        Raises Refused if it can never be served (the message has the numbers) or its id is in use, and Full with
        `retry_after` seconds if too many wait.
        """
        problem = self._problem(request)
        if problem is not None:
            self._count(self._counters.admission_rejections, "refused")
            raise Refused(f"request {request.id}: {problem}")
        if len(self._waiting) >= self.limits.waiting:
            self._count(self._counters.admission_rejections, "full")
            raise Full(len(self._waiting), self._retry_after(request.arrived))
        self._serial += 1
        order = request.arrived - request.priority * self.limits.level_s, self._serial
        sequence = Sequence(request, order, self.prefix.salt(request.tenant, request.adapter))
        self._sequences[request.id] = sequence
        insort(self._waiting, sequence, key=ORDER)
        if request.deadline is not None:
            heappush(self._deadlines, (request.deadline, order, request.id))

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

    def _tell(
        self,
        sequence: Sequence,
        tokens: tuple[int, ...] = (),
        finish: str | None = None,
        error: str | None = None,
    ) -> None:
        cached = max(sequence.cached, 0)
        self._events.append(Event(sequence.request.id, tokens, finish, error, cached, sequence.admitted))

    @property
    def idle(self) -> bool:
        """Nothing waits, runs or is under way."""
        return not self._sequences and not self._under_way

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

    @staticmethod
    def _count(numbers: dict[str, int], label: str) -> None:
        numbers[label] = numbers.get(label, 0) + 1

    # ---------------------------------------------------------------------------------------------- making a plan
    def plan(self, now: int | float) -> Plan | None:
        """The next plan; None if there is nothing to run, or if `Limits.ahead` plans are under way."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, order, request_id = heappop(self._deadlines)
            sequence = self._sequences.get(request_id)
            if sequence is not None and sequence.order == order:
                self.cancel(request_id, "deadline", now)
        if len(self._under_way) >= self.limits.ahead:
            return None
        batch = Batch()
        self._decode(batch)
        self._admit(batch, now)
        self._read(batch)
        if not batch.decodes and not batch.chunks:
            return None
        return self._made(batch, 1 if batch.chunks else self._stretch(batch))

    def _decode(self, batch: Batch) -> None:
        """One step for every row that can decode, each with a page for it, the first in order first."""
        size = self.limits.page
        for sequence in tuple(self._running):
            if sequence.row is None or sequence.reading or (sequence.request.stepwise and sequence.pending):
                continue  # an earlier one took its pages; or it reads; or the host must see its last token first
            gain = self._gain(sequence, 1)
            if gain < 1:
                continue  # all it may have is under way
            positions = sequence.length + gain - 1
            if positions <= len(sequence.pages) * size or self._grow(sequence, positions, batch):
                batch.decodes[sequence] = gain

    def _gain(self, sequence: Sequence, steps: int) -> int:
        """Tokens that so many decode steps may bring."""
        most = 1 if sequence.request.stepwise else steps * (1 + self.limits.drafts)
        return min(most, sequence.remaining)

    def _stretch(self, batch: Batch) -> int:
        """More decode steps, if pages for all of them are there for the taking."""
        steps = self.limits.steps
        if len(steps) == 1:
            return 1
        longest = max(
            -(-self._gain(sequence, steps[-1]) // (1 + self.limits.drafts)) for sequence in batch.decodes
        )
        for count in steps_for(steps, longest):
            gains = {sequence: self._gain(sequence, count) for sequence in batch.decodes}
            if self._missing((s, s.length + gain - 1) for s, gain in gains.items()) <= self.pages.available:
                break
        else:
            raise RuntimeError("a decode step has lost its pages")
        for sequence, gain in gains.items():
            self._grow(sequence, sequence.length + gain - 1, batch)
        batch.decodes = gains
        return count

    def _admit(self, batch: Batch, now: int | float) -> None:
        """Rows for those that wait, in order, as far as this plan can begin to read them.

        One that would read the same page as an earlier request is just reading is passed over: soon it may share it.
        """
        most_rows = max(rows for rows, _ in self.limits.chunks)
        budget = self._budget(batch)
        wanted = [sequence.target - sequence.computed for sequence in self._running if sequence.reading]
        i = 0
        while i < len(self._waiting) and len(wanted) < most_rows and sum(wanted) < budget:
            sequence = self._waiting[i]
            found = self._known(sequence)
            if found is None:
                i += 1
                continue
            if not self._make_room(sequence, found, batch):
                return
            del self._waiting[i]
            self._place(sequence, found, now)
            wanted.append(sequence.target - sequence.computed)

    def _known(self, sequence: Sequence) -> list[Node] | None:
        """Pages that the prefix cache has for it; None if an earlier request is about to add the next one."""
        request, limits = sequence.request, self.limits
        if not limits.prefix_cache:
            return []
        if not request.use_cache:  # others may still wait for its pages
            self.prefix.lengthen(sequence.keys, sequence.salt, sequence.tokens)
            return []
        if self._waits(sequence, sequence.waits_for):
            return None
        self.prefix.lengthen(sequence.keys, sequence.salt, sequence.tokens)
        most = (
            len(sequence.tokens) - 1
        ) // limits.page  # the last token is always computed: it gives the next one
        found = self.prefix.match(sequence.keys, sequence.salt, sequence.tokens, most)
        sequence.waits_for = None
        if len(found) < most:
            key = sequence.keys[len(found)]
            if self._waits(sequence, key):
                sequence.waits_for = key
                return None
        return found

    def _waits(self, sequence: Sequence, key: bytes | None) -> bool:
        """Whether one that is earlier in order is about to fill the page of this key."""
        other = None if key is None else self._promised.get(key)
        return other is not None and other.order < sequence.order

    def _make_room(self, sequence: Sequence, found: list[Node], batch: Batch) -> bool:
        """Whether there is a row, and pages for all that it has to read, taken from lower priorities if need be."""
        while True:
            missing = self._lacking(sequence, found)
            if self._free_rows and missing <= 0:
                return True
            victim = self._running[-1] if self._running else None
            if (
                victim is None
                or victim.request.priority >= sequence.request.priority
                or victim.order < sequence.order
            ):
                return False
            if self._free_rows and missing <= self.pages.coming:
                return False
            self._preempt(victim, batch)

    def _lacking(self, sequence: Sequence, found: list[Node]) -> int:
        """Pages that are missing for it, if those that run shall keep what they will soon need."""
        if not self._running:
            return 0  # alone it fits, now or when the plans under way are done
        own = self._pages_for(len(sequence.tokens)) - len(found)
        woken = sum(not self.pages.refs[node.page] for node in found if node.page is not None)
        soon = self._missing((other, other.target) for other in self._running if other.reading)
        return own + woken + soon + len(self._running) - self.pages.available

    def _place(self, sequence: Sequence, found: list[Node], now: int | float) -> None:
        """Give it a row, and the pages that were found."""
        sequence.row = heappop(self._free_rows)
        sequence.epoch += 1
        sequence.pending = 0
        sequence.fresh = sequence.dirty = True
        sequence.target = len(sequence.tokens)
        sequence.pages = [node.page for node in found if node.page is not None]
        for page in sequence.pages:
            self.pages.share(page)
        sequence.node = found[-1] if found else None
        sequence.named = len(found)
        sequence.computed = len(found) * self.limits.page
        for key in sequence.keys[len(found) :]:
            self._promised.setdefault(key, sequence)
        insort(self._running, sequence, key=ORDER)
        self._admissions.append(now)
        if sequence.cached < 0:
            sequence.cached = sequence.computed
            sequence.admitted = now
            if self.limits.prefix_cache and sequence.request.use_cache:
                self._counters.prefix_cache_queries += len(sequence.request.prompt)
                self._counters.prefix_cache_hits += sequence.cached

    def _read(self, batch: Batch) -> None:
        """Chunks of those that read, in order, in the shape that gets most done for its cost."""
        readers = [sequence for sequence in self._running if sequence.reading]
        if not readers:
            return
        budget = self._budget(batch)
        fixed = self.limits.step_tokens + self.limits.tokens_a_step - budget
        shape = best_shape(self.limits.chunks, [s.target - s.computed for s in readers], budget, fixed)
        for sequence in readers[: shape[0]]:
            if sequence.row is None:
                continue  # an earlier one took its pages
            end = min(sequence.target, sequence.computed + shape[1])
            self._grow(sequence, end, batch)
            count = min(end, len(sequence.pages) * self.limits.page) - sequence.computed
            if count > 0:
                batch.chunks[sequence] = count

    def _budget(self, batch: Batch) -> int:
        """Tokens that are left for chunks."""
        return self.limits.tokens_a_step - len(batch.decodes) * (1 + self.limits.drafts)

    # --------------------------------------------------------------------------------------------------- pages
    def _pages_for(self, positions: int) -> int:
        return -(-positions // self.limits.page)

    def _missing(self, wanted: Iterable[tuple[Sequence, int]]) -> int:
        """Pages that sequences lack for so many positions each."""
        return sum(max(0, self._pages_for(positions) - len(s.pages)) for s, positions in wanted)

    def _grow(self, sequence: Sequence, positions: int, batch: Batch) -> bool:
        """Pages for so many positions, taken from those last in order if need be; False if some are still missing.

        They are missing because earlier ones in order have them, or because a plan under way still does.
        """
        missing = self._pages_for(positions) - len(sequence.pages)
        if missing <= 0:
            return True
        while missing > self.pages.available and missing > self.pages.available + self.pages.coming:
            victim = self._running[-1]
            if victim is sequence:
                break
            self._preempt(victim, batch)
        for _ in range(min(missing, self.pages.available)):
            page = self.pages.take()
            if page is None:
                raise RuntimeError("the pool has fewer pages than it says")
            sequence.pages.append(page)
            sequence.dirty = True
            missing -= 1
        return missing == 0

    def _preempt(self, sequence: Sequence, batch: Batch) -> None:
        """Take row and pages of a running sequence; it waits, in its old place, to be read again."""
        batch.decodes.pop(sequence, None)
        batch.chunks.pop(sequence, None)
        self._leave(sequence)
        insort(self._waiting, sequence, key=ORDER)
        self._counters.num_preemptions += 1

    def _leave(self, sequence: Sequence) -> None:
        """Out of the rows. Plans under way hold the pages until they are done."""
        if sequence.row is None:
            return
        del self._running[bisect_left(self._running, sequence.order, key=ORDER)]
        heappush(self._free_rows, sequence.row)
        sequence.row = None
        for key in sequence.keys:
            if self._promised.get(key) is sequence:
                del self._promised[key]
        touched = any(plan.number == sequence.last_plan for plan, _ in self._under_way)
        self.pages.release(sequence.pages, after=sequence.last_plan if touched else None)
        sequence.pages = []
        sequence.node, sequence.named = None, 0
        sequence.target = sequence.computed = 0

    def _name_pages(self, sequence: Sequence) -> None:
        """Tell the prefix cache of the pages that are full of tokens now known."""
        size = self.limits.page
        if not self.limits.prefix_cache or sequence.named < 0:
            return
        full = sequence.settled // size
        if full <= sequence.named:
            return
        self.prefix.lengthen(sequence.keys, sequence.salt, sequence.tokens)
        while sequence.named < full:
            i = sequence.named
            key = sequence.keys[i]
            if self._promised.get(key) is sequence:
                del self._promised[key]
            sequence.node = self.prefix.name(
                key,
                sequence.node,
                sequence.salt,
                sequence.tokens[i * size : (i + 1) * size],
                sequence.pages[i],
            )
            if sequence.node is None:  # nothing after it could be found
                sequence.named = -1
                return
            sequence.named += 1

    # ------------------------------------------------------------------------------------- a plan is made and done
    def _made(self, batch: Batch, steps: int) -> Plan:
        """The plan of a batch, entered into the books."""
        number = self._numbers
        self._numbers += 1
        entries, starts, tables, chunks, decodes = [], [], [], [], []
        for sequence in sorted((*batch.decodes, *batch.chunks), key=attrgetter("row")):
            row, request = sequence.row, sequence.request
            if row is None:
                raise RuntimeError(f"request {request.id} is in a plan without a row")
            if sequence.fresh:
                generated = tuple(sequence.tokens[len(request.prompt) :])
                starts.append(Start(row, request, generated, sequence.computed))
            if sequence.dirty:
                tables.append(Table(row, tuple(sequence.pages)))
            sequence.fresh = sequence.dirty = False
            sequence.last_plan = number
            count = batch.chunks.get(sequence)
            if count is None:
                gain = batch.decodes[sequence]
                decodes.append(Decode(row, request, sequence.length, gain))
                over = False
            else:
                start, sequence.computed = sequence.computed, sequence.computed + count
                last = not sequence.reading
                chunks.append(Chunk(row, request, start, tuple(sequence.tokens[start : start + count]), last))
                gain = int(last and request.max_tokens > 0)
                over = last and not gain
            sequence.pending += gain
            entries.append(Entry(sequence, sequence.epoch, row, gain, over))
        # Only now: no chunk of this plan may read what another one of it writes.
        for sequence in batch.chunks:
            self._name_pages(sequence)
        shape = fitting_shape(self.limits.chunks, [chunk.count for chunk in chunks]) if chunks else None
        read = sum(chunk.count for chunk in chunks)
        self._counters.plans += 1
        self._counters.prompt_tokens += read
        self._counters.chunk_padding_tokens += shape[0] * shape[1] - read if shape else 0
        self._counters.iteration_tokens_total.observe(read + sum(decode.count for decode in decodes))
        self._counters.weight_reads += bool(chunks) + (steps if decodes else 0)
        self._counters.kv_tokens_read += steps * sum(decode.length for decode in decodes)
        plan = Plan(
            number,
            tuple(starts),
            tuple(tables),
            tuple(chunks),
            shape,
            tuple(decodes),
            steps if decodes else 0,
        )
        self._under_way.append((plan, entries))
        return plan

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
        sequence.tokens += result.tokens
        if result.tokens:
            self._time_tokens(sequence, len(result.tokens), now)
        if sequence.row is not None and len(sequence.tokens) > (sequence.named + 1) * self.limits.page:
            self._name_pages(sequence)
        finish = None
        if result.ended:
            finish = "stop"
        elif entry.over or (request.max_tokens and sequence.generated == request.max_tokens):
            finish = "length"
        if finish is not None:
            self._finish(sequence, finish, now)
        if result.tokens or finish is not None:
            self._tell(sequence, result.tokens, finish=finish)

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

    def _finish(self, sequence: Sequence, reason: str, now: int | float | None = None) -> None:
        """Out of the books, with its pages and its row."""
        if sequence.row is None:
            del self._waiting[bisect_left(self._waiting, sequence.order, key=ORDER)]
        self._leave(sequence)
        sequence.finished = True
        del self._sequences[sequence.request.id]
        self._count(self._counters.request_success, reason)
        if now is not None:
            self._time_request(sequence, now)

    # -------------------------------------------------------------------------------------------------- counting
    def _time_tokens(self, sequence: Sequence, count: int, now: int | float) -> None:
        counters, before = self._counters, sequence.last_token
        if before is None:
            sequence.first_token = now
            counters.time_to_first_token_seconds.observe(now - sequence.request.arrived)
        else:
            counters.inter_token_latency_seconds.observe((now - before) / count, count)
        sequence.last_token = now
        counters.generation_tokens += count

    def _time_request(self, sequence: Sequence, now: int | float) -> None:
        counters, request = self._counters, sequence.request
        counters.e2e_request_latency_seconds.observe(now - request.arrived)
        counters.request_prompt_tokens.observe(len(request.prompt))
        counters.request_generation_tokens.observe(sequence.generated)
        counters.request_params_max_tokens.observe(request.max_tokens)
        if sequence.admitted is None:
            return
        counters.request_prefill_kv_computed_tokens.observe(len(request.prompt) - sequence.cached)
        counters.request_queue_time_seconds.observe(sequence.admitted - request.arrived)
        counters.request_inference_time_seconds.observe(now - sequence.admitted)
        first = now if sequence.first_token is None else sequence.first_token
        counters.request_prefill_time_seconds.observe(first - sequence.admitted)
        counters.request_decode_time_seconds.observe(now - first)
        if sequence.generated > 1:
            counters.request_time_per_output_token_seconds.observe((now - first) / (sequence.generated - 1))
