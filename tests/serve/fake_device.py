"""A device without arithmetic: a slot of a page holds a hash of its token, the next token is a hash of all slots.

Whatever goes wrong with pages, tables, positions or order changes the tokens. Each plan's writes are done when it is
launched and once more when it is done, for the device may still be writing at any time in between. Only what a later
plan of the same request has written since stays as it is: a request's own plans run one after another.

In invariant mode a slot also depends on the way in which it was computed, as rounding does: on its place in a chunk, or
that a decode step wrote it.
"""

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from maxstack.serve.plan import Chunk, Decode, Limits, Plan
from maxstack.serve.request import Request, Result

VOCABULARY = 11
STOP = 10  # a token that ends a sequence


def number(*parts) -> int:
    """A number that depends on all parts, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=6).digest())


def slot(request: Request, position: int, token: int, place: int | None = None) -> int:
    """What the cache holds of a token: it depends on the adapter, as keys and values do."""
    return number("slot", request.adapter, position, token, place)


def place_of(limits: Limits | None, prompt: int, position: int) -> int | None:
    """The one place where a token may be computed in invariant mode: in its chunk, or -1 for a decode step."""
    if limits is None or not limits.invariant:
        return None
    return position % limits.chunks[0][1] if position < prompt else -1


def sampled(request: Request, slots: Sequence[int | None]) -> int:
    """The token at position len(slots), from everything before it and the request's seed."""
    return number("next", request.params, slots) % VOCABULARY


def alone(request: Request, limits: Limits | None = None) -> tuple[tuple[int, ...], str]:
    """The request's answer when nothing else exists, and why it ends."""
    tokens, prompt = list(request.prompt), len(request.prompt)
    while len(tokens) < prompt + request.max_tokens:
        slots = [slot(request, i, token, place_of(limits, prompt, i)) for i, token in enumerate(tokens)]
        tokens.append(sampled(request, slots))
        if tokens[-1] == STOP:
            return tuple(tokens[len(request.prompt) :]), "stop"
    return tuple(tokens[len(request.prompt) :]), "length"


@dataclass
class Launched:
    """A plan under way, with what it wrote and what it will answer."""

    plan: Plan
    writes: dict[tuple[int, int, str], int]
    """By page, place in the page and request."""
    results: dict[int, Result]


class FakeDevice:
    """Rows, tables and pages as a device would keep them; it knows nothing but the plans."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.slots: list[list[int | None]] = [[None] * limits.page for _ in range(limits.pages)]
        self.tables: dict[int, tuple[int, ...]] = {}
        self.owner: dict[int, Request] = {}
        self.last: dict[int, int] = {}
        self.length: dict[int, int] = {}
        self.again: dict[int, tuple[int, ...]] = {}
        self.under_way: deque[Launched] = deque()
        self._writes: dict[tuple[int, int, str], int] = {}
        self.failing: set[str] = set()
        """Ids of requests whose next result is an error."""

    def launch(self, plan: Plan) -> None:
        """Run a plan. Its results are there, but are to be asked for with `finish`."""
        self._writes = {}
        results: dict[int, Result] = {}
        for start in plan.starts:
            self.owner[start.row] = start.request
            self.again[start.row] = start.tokens if self.limits.invariant else ()
            read = () if self.limits.invariant else start.tokens
            self.length[start.row] = len(start.request.prompt) + len(read)
        for table in plan.tables:
            self.tables[table.row] = table.pages
        # The order within a plan is free: the last chunk first, decodes before chunks.
        for decode in reversed(plan.decodes):
            results[decode.row] = self._decode(decode, plan)
        for chunk in reversed(plan.chunks):
            result = self._read(chunk)
            if result is not None:
                results[chunk.row] = result
        for part in (*plan.decodes, *plan.chunks):
            if part.row in results and part.request.id in self.failing:
                self.failing.discard(part.request.id)
                results[part.row] = Result(error="no finite logits")
        self.under_way.append(Launched(plan, self._writes, results))

    def finish(self) -> tuple[Plan, dict[int, Result]]:
        """The oldest plan and its results."""
        launched = self.under_way.popleft()
        for where, value in launched.writes.items():
            if not any(where in later.writes for later in self.under_way):
                page, offset, _ = where
                self.slots[page][offset] = value
        return launched.plan, launched.results

    def lose(self) -> None:
        """The cache is gone."""
        self.under_way.clear()
        self.slots = [[None] * self.limits.page for _ in range(self.limits.pages)]

    def _write(self, row: int, position: int, token: int, place: int = -1) -> None:
        page, offset = self.tables[row][position // self.limits.page], position % self.limits.page
        value = slot(self.owner[row], position, token, place if self.limits.invariant else None)
        self.slots[page][offset] = value
        self._writes[page, offset, self.owner[row].id] = value

    def _slots(self, row: int, count: int) -> list[int | None]:
        table, page = self.tables[row], self.limits.page
        return [self.slots[table[i // page]][i % page] for i in range(count)]

    def _read(self, chunk: Chunk) -> Result | None:
        assert self.owner[chunk.row] is chunk.request
        for i, token in enumerate(chunk.tokens):
            self._write(chunk.row, chunk.start + i, token, place=i)
        if not chunk.last:
            return None
        if not chunk.request.max_tokens:
            return Result()
        assert chunk.end == self.length[chunk.row]
        return self._sampled(chunk.row)

    def _sampled(self, row: int) -> Result:
        token = sampled(self.owner[row], self._slots(row, self.length[row]))
        said = self.length[row] - len(self.owner[row].prompt)
        if said < len(self.again[row]):
            assert token == self.again[row][said], "computed again, a token is another one"
        self.last[row] = token
        self.length[row] += 1
        return Result((token,), ended=token == STOP)

    def _decode(self, decode: Decode, plan: Plan) -> Result:
        row, request = decode.row, decode.request
        assert self.owner[row] is request
        if not self.limits.drafts:
            assert self.length[row] == decode.length, "host and device disagree on a length"
        bound = decode.length + decode.count - 2  # the last position that may be written
        tokens: list[int] = []
        ended = False
        for _ in range(plan.steps):
            # Of the drafts some are right. A device does not stop at a stop token, it goes on and is not listened to.
            drafts = number("drafts", request.id, self.length[row]) % (plan.drafts + 1)
            for _ in range(1 + drafts):
                if len(tokens) == decode.count and not ended:
                    break
                if self.length[row] - 1 > bound:
                    break
                self._write(row, self.length[row] - 1, self.last[row])
                [token] = self._sampled(row).tokens
                if not ended:
                    tokens.append(token)
                    ended = token == STOP
            if drafts < plan.drafts and self.length[row] - 1 <= bound:
                self._write(
                    row, self.length[row] - 1, VOCABULARY
                )  # a draft that was wrong was written all the same
        return Result(tuple(tokens), ended)
