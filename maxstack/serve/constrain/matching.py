"""One answer's way through a grammar: which tokens may come next, a function of those that came."""

import time
from collections.abc import Sequence

import llguidance
import numpy as np

from maxstack.serve.constrain.constraint import Bounds


class Matching:
    """Follows one answer. Used by the engine's thread; `take` is given the tokens that the caller was told of."""

    def __init__(
        self, matcher: llguidance.LLMatcher, vocab_size: int, bounds: Bounds, *, ends: Sequence[int] = (),
        held_off: int = 0, never_ends: bool = False,
    ):  # fmt: skip
        """`ends` are tokens that end the answer. They are left out for the first `held_off` tokens, and always with
        `never_ends`, as long as the grammar has anything else."""
        self._matcher, self._bounds = matcher, bounds
        self._buffer = np.zeros(words_for(vocab_size + 1), np.uint32)
        self.words_w = self._buffer[: words_for(vocab_size)]
        """One bit a token of the vocabulary: whether it may come next."""
        self.over = False
        """The grammar has come to its end: nothing can follow."""
        self.fault: str | None = None
        """Why it cannot go on; None while it can."""
        self._held_off, self._never_ends = held_off, never_ends
        self._ends_w = bits_of(ends, vocab_size)
        self._known_w = bits_below(vocab_size)
        self._taken, self._spent = 0, 0.0
        self._look()

    def take(self, tokens: Sequence[int]) -> None:
        """The answer has gone on by these tokens."""
        begun = time.perf_counter()
        if not self._matcher.consume_tokens(list(tokens)):
            self.fault = f"the answer left its grammar: {self._matcher.get_error()}"
        self._taken += len(tokens)
        if self.fault is None:
            self._look()
        self._spent += time.perf_counter() - begun
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
        self.words_w &= self._known_w
        if self._never_ends or self._taken < self._held_off:
            others_w = self.words_w & ~self._ends_w
            if others_w.any():
                self.words_w[:] = others_w
        if not self.over and not self.words_w.any():
            self.fault = "no token of the vocabulary can go on from here in the grammar"


def words_for(vocab_size: int) -> int:
    """Words of 32 bits for one bit a token."""
    return -(-vocab_size // 32)


def bits_of(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """Words with the bits of some tokens."""
    flags = np.zeros(words_for(vocab_size) * 32, bool)
    flags[[token for token in ids if token < vocab_size]] = True
    return np.packbits(flags, bitorder="little").view("<u4").astype(np.uint32)


def bits_below(vocab_size: int) -> np.ndarray:
    """Words with the bits of the whole vocabulary."""
    return bits_of(range(vocab_size), vocab_size)
