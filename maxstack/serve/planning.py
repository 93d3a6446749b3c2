"""How a plan is made: who decodes, who is admitted, who reads, in which shape.

The order of requests never changes: by arrival, a level of priority counting as `Limits.level_s` seconds. It decides
who is admitted first, who is read first, and, from its other end, who gives up pages when there are none left. So the
first in order always makes progress, and everybody is first some day.
"""

from bisect import insort
from heapq import heappop
from operator import attrgetter

from maxstack.serve.batch import Batch, best_shape, fitting_shape, steps_for
from maxstack.serve.books import ORDER, Books, Entry
from maxstack.serve.plan import Chunk, Decode, Plan, Start, Table, places
from maxstack.serve.prefix import Node
from maxstack.serve.sequence import Sequence


class Planning(Books):
    """Decides what the next plan holds."""

    def _batch(self, now: int | float) -> Batch:
        """What the next plan may hold."""
        batch = Batch()
        self._drafts = self.drafting(len(self._running))
        self._decode(batch)
        self._admit(batch, now)
        self._read(batch)
        return batch

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
        most = 1 if sequence.request.stepwise else steps * (1 + self._drafts)
        return min(most, sequence.remaining)

    def _stretch(self, batch: Batch) -> int:
        """More decode steps, if pages for all of them are there for the taking."""
        steps = self.limits.steps
        if len(steps) == 1 or any(sequence.request.stepwise for sequence in self._running):
            return 1  # one that goes step by step sits out every other plan at best: those are short
        longest = max(-(-self._gain(sequence, steps[-1]) // (1 + self._drafts)) for sequence in batch.decodes)
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
        most_rows = max(shape[0] for shape in self.limits.chunks)
        budget = self._budget(batch)
        wanted = [sequence.target - sequence.computed for sequence in self._running if sequence.reading]
        i = 0
        while i < len(self._waiting) and len(wanted) < most_rows and sum(wanted) < budget:
            sequence = self._waiting[i]
            held = self.holding and sequence.cached < 0
            found = None if held else self._known(sequence)
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
        request, limits, text = sequence.request, self.limits, self._text(sequence)
        if not limits.prefix_cache:
            return []
        if not request.use_cache:  # others may still wait for its pages
            self.prefix.lengthen(sequence.keys, sequence.salt, text)
            return []
        if self._waits(sequence, sequence.waits_for):
            return None
        self.prefix.lengthen(sequence.keys, sequence.salt, text)
        # The last token is always computed: it gives the next one.
        most = whole((len(text) - 1) // limits.page, limits.pages_at_once)
        found = self.prefix.match(sequence.keys, sequence.salt, text, most)
        sequence.waits_for = None
        if len(found) < most:
            key = sequence.keys[len(found)]
            if self._waits(sequence, key):
                sequence.waits_for = key
                return None
        return found[: whole(len(found), limits.pages_at_once)]

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
        soon = self._missing(
            (other, len(other.tokens)) for other in self._running if other.reading or other.replay
        )
        return own + woken + soon + len(self._running) - self.pages.available

    def _place(self, sequence: Sequence, found: list[Node], now: int | float) -> None:
        """Give it a row, and the pages that were found."""
        sequence.row = heappop(self._free_rows)
        sequence.epoch += 1
        sequence.pending = 0
        sequence.fresh = sequence.dirty = True
        sequence.target = len(self._text(sequence))
        sequence.replay = len(sequence.tokens) - sequence.target
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
        left = places(shape)
        for sequence in readers[: shape[0]]:
            if sequence.row is None:
                continue  # an earlier one took its pages
            end = min(sequence.target, sequence.computed + min(shape[1], left))
            self._grow(sequence, end, batch)
            count = min(end, len(sequence.pages) * self.limits.page) - sequence.computed
            if self.limits.invariant and count < end - sequence.computed:
                continue  # pages are missing, and a chunk that was cut would put the next ones elsewhere
            if count > 0:
                batch.chunks[sequence] = count
                left -= count

    def _budget(self, batch: Batch) -> int:
        """Tokens that are left for chunks."""
        return self.limits.tokens_a_step - len(batch.decodes) * (1 + self._drafts)

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
        self._counters.chunk_padding_tokens += places(shape) - read if shape else 0
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
            self._drafts if decodes else 0,
        )
        self._under_way.append((plan, entries))
        return plan


def whole(count: int, at_once: int) -> int:
    """As many of `count` as come in whole lots."""
    return count - count % at_once
