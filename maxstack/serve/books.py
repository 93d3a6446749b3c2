"""What the scheduler knows: requests that wait and run, their rows and pages, the plans under way."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Tokens
from heapq import heappush
from operator import attrgetter
from typing import NamedTuple

from maxstack.serve.batch import Batch
from maxstack.serve.counters import Counters
from maxstack.serve.pages import Pages
from maxstack.serve.plan import Limits, Plan
from maxstack.serve.prefix import Prefix
from maxstack.serve.request import Event
from maxstack.serve.sequence import Sequence
from maxstack.serve.timing import time_request

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


class Books:
    """Sequences in and out of rows, pages to and from them. Who gets what is decided in `planning`."""

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
        self.drafting: Callable[[int], int] = lambda rows: limits.drafts
        """How many tokens a plan speculates, when at most so many rows decode."""
        self._drafts = limits.drafts  # of the plan in the making
        self.holding = False
        """Requests that have not begun wait, whatever is free."""

    def _tell(
        self,
        sequence: Sequence,
        tokens: tuple[int, ...] = (),
        finish: str | None = None,
        error: str | None = None,
    ) -> None:
        cached = max(sequence.cached, 0)
        self._events.append(Event(sequence.request.id, tokens, finish, error, cached, sequence.admitted))

    @staticmethod
    def _count(numbers: dict[str, int], label: str) -> None:
        numbers[label] = numbers.get(label, 0) + 1

    def _text(self, sequence: Sequence) -> Tokens[int]:
        """The tokens that it reads, and that pages are shared by: all that are known, or, in invariant mode, its
        prompt, for keys and values that decode steps make are rounded otherwise than those of chunks."""
        return sequence.request.prompt if self.limits.invariant else sequence.tokens

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

    def _finish(self, sequence: Sequence, reason: str, now: int | float | None = None) -> None:
        """Out of the books, with its pages and its row."""
        if sequence.row is None:
            del self._waiting[bisect_left(self._waiting, sequence.order, key=ORDER)]
        self._leave(sequence)
        sequence.finished = True
        del self._sequences[sequence.request.id]
        self._count(self._counters.request_success, reason)
        if now is not None:
            time_request(self._counters, sequence, now)

    def _name_pages(self, sequence: Sequence) -> None:
        """Tell the prefix cache of the pages that are full of tokens now known."""
        size = self.limits.page
        if not self.limits.prefix_cache or sequence.named < 0:
            return
        text = self._text(sequence)
        full = min(sequence.settled, len(text)) // size
        if full <= sequence.named:
            return
        self.prefix.lengthen(sequence.keys, sequence.salt, text)
        while sequence.named < full:
            i = sequence.named
            key = sequence.keys[i]
            if self._promised.get(key) is sequence:
                del self._promised[key]
            sequence.node = self.prefix.name(
                key,
                sequence.node,
                sequence.salt,
                text[i * size : (i + 1) * size],
                sequence.pages[i],
            )
            if sequence.node is None:  # nothing after it could be found
                sequence.named = -1
                return
            sequence.named += 1
