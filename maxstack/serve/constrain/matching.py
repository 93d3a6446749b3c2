"""One answer's way through a grammar: which tokens may come next, a function of those that came."""

import dataclasses
import time
from collections.abc import Collection, Sequence
from typing import Protocol, Self, runtime_checkable

import numpy as np

from maxstack.config import UserError
from maxstack.models.generation.params import SamplingParams
from maxstack.serve.constrain.constraint import Bounds, Constraint


@runtime_checkable
class Matcher(Protocol):
    """The part of `llguidance.LLMatcher` that is needed. It raises nothing: after a fault it stays in error."""

    def deep_copy(self) -> Self:
        """Another one in the same state."""
        ...

    def consume_tokens(self, sampled_tokens: list[int]) -> bool:
        """Go on by these."""
        ...

    def unsafe_compute_mask_ptr(self, trg_pointer: int, trg_byte_size: int) -> None:
        """Write a bit for each token that may come next."""
        ...

    def is_error(self) -> bool:
        """Whether there was a fault."""
        ...

    def get_error(self) -> str:
        """What it was."""
        ...

    def is_stopped(self) -> bool:
        """Whether nothing but an end can follow."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """A grammar for one vocabulary, for any number of answers."""

    constraint: Constraint
    vocab_size: int
    bounds: Bounds
    matcher: Matcher
    """At the beginning; answers take copies."""

    def start(self, params: SamplingParams, end_ids: Collection[int], vocab_size: int) -> "Matching":
        """For one answer. Raises UserError where it was compiled for another vocabulary."""
        if vocab_size != self.vocab_size:
            raise UserError(
                f"the constraint was compiled for {self.vocab_size} tokens and the model has {vocab_size}: compile it "
                "with the Grammars of this engine"
            )
        return Matching(
            self.matcher.deep_copy(), vocab_size, self.bounds, ends=end_ids, stops=params.stop_token_ids,
            held_off=params.min_tokens, never_ends=params.ignore_eos,
        )  # fmt: skip


def left_to_the_engine(params: SamplingParams) -> SamplingParams:
    """The settings of a bound answer without those that its grammar sees to: an end may be all that it has left."""
    return dataclasses.replace(params, min_tokens=0, ignore_eos=False)


class Matching:
    """Follows one answer. Used by the engine's thread; `take` is given the tokens that the caller was told of."""

    def __init__(
        self, matcher: Matcher, vocab_size: int, bounds: Bounds, *, ends: Collection[int] = (),
        stops: Collection[int] = (), held_off: int = 0, never_ends: bool = False,
    ):  # fmt: skip
        """`ends` are the grammar's end tokens. Where one of them may come, so may `stops`, which end this answer. For
        the first `held_off` tokens both are left out as long as the grammar has anything else, and with `never_ends`
        the first always are."""
        self._matcher, self._bounds = matcher, bounds
        self._buffer = np.zeros(words_for(vocab_size + 1), np.uint32)
        self.words_w = self._buffer[: words_for(vocab_size)]
        """One bit a token of the vocabulary: whether it may come next."""
        self.over = False
        """The grammar has come to its end: nothing can follow."""
        self.fault: str | None = None
        """Why it cannot go on; None while it can."""
        self._held_off, nobody = held_off, bits_of((), vocab_size)
        # One token more than the vocabulary is the end of grammars where it has none.
        self._ends = bits_of(ends or (vocab_size,), vocab_size + 1)
        self._ends_w, self._stops_w = bits_of(ends, vocab_size), bits_of(stops, vocab_size)
        self._unwanted_w = self._ends_w & ~self._stops_w if never_ends else nobody
        self._known_w = bits_below(vocab_size)
        self._taken, self._spent = 0, 0.0
        self._look()

    def allowed(self) -> list[int]:
        """The tokens that may come next."""
        flags = np.unpackbits(self.words_w.astype("<u4").view(np.uint8), bitorder="little")
        return np.nonzero(flags)[0].tolist()

    def take(self, tokens: Sequence[int]) -> None:
        """The answer has gone on by these tokens."""
        begun = time.thread_time()  # the processor's time: a busy machine is no fault of the grammar's
        if not self._matcher.consume_tokens(list(tokens)):
            self.fault = f"the answer left its grammar: {self._matcher.get_error()}"
        self._taken += len(tokens)
        if self.fault is None:
            self._look()
        self._spent += time.thread_time() - begun
        allowed = self._bounds.mask_grace_s + self._bounds.mask_token_s * self._taken
        if self.fault is None and self._spent > allowed:
            self.fault = (
                f"following the grammar took {self._spent:.2f} s for {self._taken} tokens, more than the {allowed:.2f} "
                "s that it may: give a simpler one"
            )

    def _look(self) -> None:
        """The tokens that may come next."""
        matcher = self._matcher
        matcher.unsafe_compute_mask_ptr(self._buffer.ctypes.data, self._buffer.nbytes)
        if matcher.is_error():
            self.fault = f"the grammar is too much for one step: {matcher.get_error()}"
            return
        self.over = matcher.is_stopped()
        if (self._buffer & self._ends).any():
            self.words_w |= self._stops_w
        self.words_w &= self._known_w
        early = self._taken < self._held_off
        others_w = self.words_w & ~(self._ends_w | self._stops_w if early else self._unwanted_w)
        if others_w.any():
            self.words_w[:] = others_w
        if not self.over and not self.words_w.any():
            self.fault = "no token of the vocabulary can go on from here in the grammar"


def words_for(vocab_size: int) -> int:
    """Words of 32 bits for one bit a token."""
    return -(-vocab_size // 32)


def bits_of(ids: Collection[int], vocab_size: int) -> np.ndarray:
    """Words with the bits of some tokens; those that the vocabulary lacks have none."""
    words = np.zeros(words_for(vocab_size), np.uint32)
    for token in ids:
        if token < vocab_size:
            words[token >> 5] |= np.uint32(1 << (token & 31))
    return words


def bits_below(vocab_size: int) -> np.ndarray:
    """Words with the bits of the whole vocabulary."""
    words = np.full(words_for(vocab_size), 0xFFFFFFFF, np.uint32)
    if vocab_size % 32:
        words[-1] = (1 << vocab_size % 32) - 1
    return words
