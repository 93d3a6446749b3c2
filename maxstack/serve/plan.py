"""The limits of a server, and a plan: one launch of the device, made on the host, of shapes from closed tables."""

from dataclasses import dataclass
from typing import NamedTuple

from maxstack.serve.request import Request

Shape = tuple[int, int] | tuple[int, int, int]
"""Rows, tokens of each, and perhaps tokens of all."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes that the programs are compiled for, and the settings of the scheduler (docs/scheduler.md)."""

    rows: int
    """Sequences at once. A row is an index into what the device keeps for each sequence."""
    page: int
    """Tokens a page of the cache."""
    pages: int
    """Pages of the pool, numbered from 0."""
    max_length: int
    """Tokens of prompt and answer together. Tables have `table_width` entries a row."""
    tokens_a_step: int
    """Bound of a step's work: one token a decoding row (and its drafts), and the chunks with their padding."""
    chunks: tuple[Shape, ...] = ((1, 32), (1, 128), (1, 512), (4, 128), (8, 32))
    """Shapes in which prompts are read, each compiled once: (rows, tokens of each), or (rows, tokens of each, tokens of
    all), which are computed side by side without padding: a form for CPUs."""
    steps: tuple[int, ...] = (1, 4)
    """Numbers of decode steps that a plan without chunks may have. A plan with chunks has one."""
    drafts: int = 0
    """Tokens that are speculated a step and row, on top of the one."""
    ahead: int = 2
    """Plans under way at once: with 2, the host makes one while the device runs the one before."""
    waiting: int = 256
    """Requests that may wait; more are told to come back."""
    waiting_a_tenant: int | None = None
    """Of each tenant; None lets one have the whole queue."""
    level_s: float = 30.0
    """A level of priority counts as much as having arrived this many seconds earlier."""
    step_tokens: int = 64
    """Tokens that cost as much time as a step costs however few it has (weights are read): how dear padding is."""
    retries: int = 1
    """Times that a request is started again after the device lost the cache."""
    prefix_cache: bool = True
    invariant: bool = False
    """A token is always computed in one way, so that its rounding does not depend on company or history: prompts by
    chunks of one shape, which begin at multiples of its length, answers by decode steps of one shape, and both so again
    when they are computed again."""

    def __post_init__(self):
        for name in ("rows", "page", "pages", "max_length", "ahead", "waiting"):
            if getattr(self, name) < 1:
                raise ValueError(f"limits: {name} is {getattr(self, name)}; it must be 1 or more")
        if self.waiting_a_tenant is not None and self.waiting_a_tenant < 1:
            raise ValueError(
                f"limits: waiting_a_tenant is {self.waiting_a_tenant}; it must be 1 or more, or None"
            )
        if sorted(set(self.steps)) != list(self.steps) or self.steps[:1] != (1,):
            raise ValueError(f"limits: steps {self.steps} must rise and begin with 1")
        if not self.chunks or any(min(shape) < 1 or len(shape) not in (2, 3) for shape in self.chunks):
            raise ValueError(
                f"limits: chunks {self.chunks} must be pairs (rows, tokens) or triples (rows, tokens, tokens of all), "
                "of 1 or more"
            )
        if self.invariant:
            self._check_invariant()
        decodes = self.rows * (1 + self.drafts)
        smallest = min(map(places, self.chunks))
        if decodes + smallest > self.tokens_a_step:
            raise ValueError(
                f"limits: {self.rows} rows of {1 + self.drafts} tokens and the smallest chunk, {smallest} tokens, are "
                f"more than the {self.tokens_a_step} tokens of a step: new requests could wait for ever"
            )

    def _check_invariant(self) -> None:
        """Raises ValueError for sizes with which a token could be computed in several ways."""
        if self.drafts:
            raise ValueError(
                f"limits: drafts {self.drafts} in invariant mode: guesses are read in steps of another shape, which "
                "rounds differently; leave one of them out"
            )
        if len(self.chunks) != 1 or len(self.chunks[0]) != 2:
            raise ValueError(
                f"limits: chunks {self.chunks} in invariant mode: all prompts are read in one shape, so give one pair "
                "(rows, tokens)"
            )
        tokens = self.chunks[0][1]
        if tokens % self.page and self.page % tokens:
            raise ValueError(
                f"limits: chunks of {tokens} tokens and pages of {self.page} in invariant mode: one must be a multiple "
                "of the other, for pages are shared that whole chunks have filled"
            )

    @property
    def pages_at_once(self) -> int:
        """Pages of a prompt that are shared together or not at all: those of a chunk in invariant mode."""
        return max(1, self.chunks[0][1] // self.page) if self.invariant else 1

    @property
    def table_width(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.max_length // self.page)


def places(shape: Shape) -> int:
    """Tokens that a chunk of this shape computes, padding included."""
    return shape[2] if len(shape) == 3 else shape[0] * shape[1]


class Start(NamedTuple):
    """A row gets a sequence, new or returning: what the device keeps for the row begins afresh."""

    row: int
    request: Request
    tokens: tuple[int, ...]
    """Generated before, by a sequence that was preempted: penalties count them, the row reads them like a prompt. In
    invariant mode it says them again, one a step, whatever it would draw."""
    cached: int
    """Positions that the pages hold already, a multiple of the page."""


class Table(NamedTuple):
    """The pages of a row, all of them, because they changed: positions i·page … are in `pages[i]`."""

    row: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Known tokens to be read into positions start … end - 1."""

    row: int
    request: Request
    start: int
    tokens: tuple[int, ...]
    last: bool
    """The row has no further token to read: the next one is sampled, unless the request asks for none."""

    @property
    def count(self) -> int:
        """Tokens, `plan.chunk_shape[1]` at most."""
        return len(self.tokens)

    @property
    def end(self) -> int:
        """Positions that are in the cache afterwards."""
        return self.start + len(self.tokens)


class Decode(NamedTuple):
    """A row whose last token is still to be fed: it lies on the device, and the host may not have seen it yet."""

    row: int
    request: Request
    length: int
    """Tokens before the first step, that last one included; with drafts, at most."""
    count: int
    """Tokens that the row may gain, `plan.steps` at most without drafts. It writes up to position length + count - 2,
    which its pages cover, and nothing further."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Starts and tables, then the chunks together with one decode step, then `steps - 1` further decode steps.

    A row is in one of `chunks` and `decodes` at most; rows in neither must not be written. No chunk reads a page that
    another row of the plan writes, so the order within a plan is free. Plans run in the order of their numbers, every
    one of them, also when a request in it was cancelled since: its pages stay its own until the plan is done.
    """

    number: int
    starts: tuple[Start, ...]
    tables: tuple[Table, ...]
    chunks: tuple[Chunk, ...]
    chunk_shape: Shape | None
    """The one of `Limits.chunks` that they are padded to; None without chunks."""
    decodes: tuple[Decode, ...]
    steps: int
    """One of `Limits.steps`, 0 without decodes."""
    drafts: int = 0
    """Tokens that decodes speculate a step and row: `Limits.drafts` or none."""
