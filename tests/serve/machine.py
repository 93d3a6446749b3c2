"""A hypothesis state machine over the scheduler and a fake device, with what must hold after every step."""

import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from maxstack.serve.plan import Limits, Plan, places
from maxstack.serve.request import Event, Full, Request
from maxstack.serve.scheduler import Scheduler
from maxstack.serve.sequence import Sequence
from tests.serve.fake_device import FakeDevice, alone, place_of, slot

TIGHT = Limits(
    rows=3, page=4, pages=12, max_length=32, tokens_a_step=17, chunks=((1, 4), (1, 16), (3, 4)), steps=(1, 3),
    waiting=6, level_s=5.0, step_tokens=4,
)  # fmt: skip
LIMITS = [
    TIGHT,
    replace(TIGHT, chunks=((2, 4, 4), (3, 12, 12))),
    replace(TIGHT, rows=4, page=2, pages=18, drafts=2, tokens_a_step=16, chunks=((1, 3), (2, 4))),
    replace(TIGHT, rows=2, pages=8, ahead=1, steps=(1,), prefix_cache=False),
    replace(TIGHT, rows=6, pages=60, ahead=3, steps=(1, 2, 5), tokens_a_step=40, waiting=20),
    replace(TIGHT, pages=14, ahead=4),
]
INVARIANT = [
    replace(TIGHT, chunks=((1, 8),), invariant=True),
    replace(TIGHT, rows=4, pages=14, chunks=((2, 2),), steps=(1,), invariant=True),
    replace(TIGHT, rows=4, pages=16, chunks=((3, 4),), ahead=3, invariant=True),
]
LIMITS += INVARIANT
BEGINNINGS = [(1, 2, 3, 4) * 5, (1, 2, 3, 4, 5, 6, 7, 8, 9, 0) * 2, (7,) * 20]
DONE = {"stop", "length"}


class Serving(RuleBasedStateMachine):
    """Requests come, plans are made ahead of results, requests are cancelled, rows and steps fail."""

    choices = LIMITS

    scheduler_class = Scheduler

    @initialize(data=st.data())
    def begin(self, data):
        limits: Limits = data.draw(st.sampled_from(self.choices))
        self.limits = limits
        self.scheduler = self.scheduler_class(limits)
        # Where there are guesses at all, two plans of three have some.
        self.scheduler.drafting = lambda rows: limits.drafts * (self.scheduler._numbers % 3 > 0)
        self.device = FakeDevice(limits)
        self.now = 0.0
        self.requests: dict[str, Request] = {}
        self.answers: dict[str, list[int]] = {}
        self.ends: dict[str, str] = {}
        self.touched: dict[
            int, list[tuple[Request, tuple[int, ...]]]
        ] = {}  # pages of rows, by plan under way

    # ------------------------------------------------------------------------------------------------ what happens
    @rule(
        beginning=st.sampled_from(BEGINNINGS), shared=st.integers(0, 20),
        rest=st.lists(st.integers(0, 9), min_size=1, max_size=6), max_tokens=st.integers(0, 12),
        priority=st.sampled_from([0, 0, 0, 1, -1]), lives=st.sampled_from([None, None, 3.0]),
        adapter=st.sampled_from(["", "", "a"]),
        flags=st.sampled_from([{}, {}, {"stepwise": True}, {"use_cache": False}]),
    )  # fmt: skip
    def add(self, beginning, shared, rest, max_tokens, priority, lives, adapter, flags):
        name = f"r{len(self.requests)}"
        prompt = (*beginning[:shared], *rest)
        request = Request(
            id=name, prompt=prompt, max_tokens=min(max_tokens, self.limits.max_length - len(prompt)),
            arrived=self.now, deadline=None if lives is None else self.now + lives, priority=priority,
            adapter=adapter, params=len(rest) % 2, **flags,
        )  # fmt: skip
        if self.scheduler.counters.num_requests_waiting >= self.limits.waiting:
            with pytest.raises(Full) as full:
                self.scheduler.add(request)
            assert 1 <= full.value.retry_after <= 60
            return
        self.scheduler.add(request)
        self.requests[name] = request
        self.answers[name] = []

    @rule(seconds=st.floats(0.01, 2.0))
    def time_goes_on(self, seconds):
        self.now += seconds

    @rule()
    def make_a_plan(self):
        before = self.scheduler.prefix.named()
        first = self._first_running()
        running = {sequence.request.id for sequence in self.scheduler._running}
        plan = self.scheduler.plan(self.now)
        if plan is None:
            return
        assert len(self.device.under_way) < self.limits.ahead
        self._check_plan(plan, running)
        self._check_progress(plan, first)
        self.device.launch(plan)
        self._check_writes(plan, before)

    @precondition(lambda self: self.device.under_way)
    @rule()
    def results_come(self):
        plan, results = self.device.finish()
        self.touched.pop(plan.number)
        self._hear(self.scheduler.done(plan, results, self.now))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from(sorted(self.requests)))
        self._hear(self.scheduler.events())  # a deadline may have ended it
        assert self.scheduler.cancel(name) == (name not in self.ends)
        self._hear(self.scheduler.events())
        assert name in self.ends

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def a_row_will_fail(self, data):
        self.device.failing.add(data.draw(st.sampled_from(sorted(self.requests))))

    @precondition(lambda self: self.device.under_way)
    @rule(chance=st.integers(0, 5))
    def a_step_fails(self, chance):
        if chance:
            return
        self.device.lose()
        self.touched.clear()
        self._hear(self.scheduler.lost(self.now, "out of memory"))
        assert not self.scheduler.pages.census()["held"]

    def teardown(self):
        """Everything ends, in not too many plans, and leaves every page free or kept."""
        if not hasattr(self, "scheduler") or sys.exc_info()[0] is not None:
            return
        work = sum(len(r.prompt) + r.max_tokens for n, r in self.requests.items() if n not in self.ends)
        for _ in range(100 + 10 * work):
            if self.scheduler.idle:
                break
            self.make_a_plan()
            if len(self.device.under_way) == self.limits.ahead or not self.scheduler._sequences:
                if self.device.under_way:
                    self.results_come()
            elif self.device.under_way:
                made = self.scheduler._numbers
                self.make_a_plan()
                if self.scheduler._numbers == made:
                    self.results_come()
            else:
                self._hear(self.scheduler.events())
                assert self.scheduler.idle, "requests wait, nothing is under way, and no plan is made"
            self.check_everything()
        self._hear(self.scheduler.events())
        assert self.scheduler.idle, "requests were starved"
        assert set(self.ends) == set(self.requests)
        assert not self.scheduler.pages.census()["held"]
        assert sorted(self.scheduler._free_rows) == list(range(self.limits.rows))
        assert not self.scheduler._promised

    # --------------------------------------------------------------------------------------------- what must hold
    def _hear(self, events: list[Event]):
        for event in events:
            request = self.requests[event.id]
            assert event.id not in self.ends, "an event after the end"
            self.answers[event.id] += event.tokens
            tokens, finish = alone(request, self.limits)
            if event.finish in DONE:
                assert (tuple(self.answers[event.id]), event.finish) == (tokens, finish)
            else:
                assert tuple(self.answers[event.id]) == tokens[: len(self.answers[event.id])]
            if event.finish is not None:
                self.ends[event.id] = event.finish
            assert event.cached % self.limits.page == 0
            assert event.cached < len(request.prompt)

    def _first_running(self) -> Sequence | None:
        running = self.scheduler._running
        waiting = self.scheduler._waiting
        first = running[0] if running else None
        return first if first and not (waiting and waiting[0].order < first.order) else None

    def _check_progress(self, plan: Plan, first: Sequence | None):
        """The first in order is in every plan, unless it must wait for results, or for pages of plans under way."""
        if first is None or first.finished or first.row in {r.row for r in (*plan.chunks, *plan.decodes)}:
            return
        awaits = not first.reading and (first.remaining < 1 or (first.request.stepwise and first.pending))
        assert awaits or self.scheduler.pages.lent(), "the first in order was passed over"

    def _check_plan(self, plan: Plan, running_before: set[str]):
        limits = self.limits
        rows = [part.row for part in (*plan.chunks, *plan.decodes)]
        assert len(set(rows)) == len(rows)
        assert all(0 <= row < limits.rows for row in rows)
        area = 0
        if plan.chunks:
            assert plan.chunk_shape in limits.chunks
            assert len(plan.chunks) <= plan.chunk_shape[0]
            assert all(1 <= chunk.count <= plan.chunk_shape[1] for chunk in plan.chunks)
            area = places(plan.chunk_shape)
            assert sum(chunk.count for chunk in plan.chunks) <= area
        else:
            assert plan.chunk_shape is None
        assert area + len(plan.decodes) * (1 + limits.drafts) <= limits.tokens_a_step
        assert plan.steps in limits.steps if plan.decodes else plan.steps == 0
        assert plan.steps <= 1 or not plan.chunks
        for decode in plan.decodes:
            assert 1 <= decode.count <= plan.steps * (1 + limits.drafts)
            assert decode.length + decode.count <= len(decode.request.prompt) + decode.request.max_tokens
            assert not decode.request.stepwise or decode.count == 1
        starts = {start.row: start for start in plan.starts}
        owners = {s.row: s for s in self.scheduler._running}
        for part in (*plan.chunks, *plan.decodes):
            assert owners[part.row].request is part.request
        for start in starts.values():
            if start.request.id in running_before:
                continue  # it had its row, but no chunk in the plan before
            waiting = [s for s in self.scheduler._waiting if s.order < owners[start.row].order]
            assert all(s.waits_for is not None for s in waiting), "somebody was overtaken"

    def _check_writes(self, plan: Plan, named_before: dict):
        """Nobody but the row that writes a page has it, and no plan under way may still touch it."""
        launched = self.device.under_way[-1]
        tables = self.device.tables
        mine = [(part.request, tables[part.row]) for part in (*plan.chunks, *plan.decodes)]
        written = {page for page, _, _ in launched.writes}
        named = self.scheduler.prefix.named()
        kept = {page for page, node in named_before.items() if named.get(page) is node}
        assert not written & kept, "a page was written that others may share"
        for page in written:
            users = {id(request) for request, pages in mine if page in pages}
            users |= {
                id(request) for rows in self.touched.values() for request, pages in rows if page in pages
            }
            assert len(users) == 1, "a page is written that another row has"
        self.touched[plan.number] = mine
        for chunk in plan.chunks:
            assert len(tables[chunk.row]) * self.limits.page >= chunk.end

    @invariant()
    def check_everything(self):
        if not hasattr(self, "scheduler"):
            return
        self._check_pages()
        self._check_contents()
        counters = self.scheduler.counters
        assert counters.num_requests_running + counters.num_requests_waiting == len(self.scheduler._sequences)

    def _check_pages(self):
        """Every page is in one place, and has as many holders as are found."""
        scheduler, pages = self.scheduler, self.scheduler.pages
        census = pages.census()
        assert sorted(census["held"] + census["kept"] + census["free"]) == list(range(self.limits.pages))
        tables = [sequence.pages for sequence in scheduler._running]
        holders = Counter(page for table in (*tables, *pages.lent()) for page in table)
        assert {page: refs for page, refs in enumerate(pages.refs) if refs} == dict(holders)
        assert all(len(set(table)) == len(table) for table in tables)
        assert all(not s.pages and s.row is None for s in scheduler._waiting)
        rows = [s.row for s in scheduler._running if s.row is not None]
        assert sorted(rows + scheduler._free_rows) == list(range(self.limits.rows))
        named = scheduler.prefix.named()
        assert set(census["kept"]) <= set(named)
        assert not set(census["free"]) & set(named)
        running = {s.order: s for s in scheduler._running}
        assert all(running[s.order] is s for s in scheduler._promised.values())
        waiting = [s.order for s in scheduler._waiting]
        assert waiting == sorted(waiting)

    def _check_contents(self):
        """Settled positions hold what the tokens say, in the tables of sequences and under the names of pages."""
        size, slots = self.limits.page, self.device.slots
        for sequence in self.scheduler._running:
            for i in range(sequence.settled):
                held = slots[sequence.pages[i // size]][i % size]
                place = place_of(self.limits, len(sequence.request.prompt), i)
                assert held == slot(sequence.request, i, sequence.tokens[i], place), (
                    "a page holds other tokens"
                )
        adapters = {self.scheduler.prefix.salt("", name): name for name in ("", "a")}
        for page, node in self.scheduler.prefix.named().items():
            depth, above = 0, node.parent
            while above is not None:
                depth, above = depth + 1, above.parent
            request = Request(id="", prompt=(0,), max_tokens=0, arrived=0, adapter=adapters[node.salt])
            expected = [
                slot(request, at, token, place_of(self.limits, self.limits.max_length, at))
                for at, token in enumerate(node.tokens, depth * size)
            ]
            assert slots[page] == expected, "a named page holds other tokens"
