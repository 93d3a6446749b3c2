"""Constraints compiled into grammars, beside the event loop and the engine, within bounds."""

import asyncio
import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import llguidance

from maxstack.config import UserError
from maxstack.data.tokenizer import Tokenizer
from maxstack.models.generation.params import SamplingParams
from maxstack.serve.constrain.constraint import BadConstraint, Bounds, Constraint
from maxstack.serve.constrain.matching import Matching
from maxstack.serve.constrain.sources import checked_text, grammar_of
from maxstack.serve.constrain.vocabulary import vocabulary

THREADS = 2
SAID = 500
"""Characters of llguidance's own words that go into an error."""


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """A grammar for one vocabulary, for any number of answers."""

    constraint: Constraint
    vocab_size: int
    bounds: Bounds
    matcher: llguidance.LLMatcher
    """At the beginning; answers take copies."""

    def start(self, params: SamplingParams, ends: Collection[int], vocab_size: int) -> Matching:
        """For one answer that `ends` end. Raises UserError where it was compiled for another vocabulary."""
        if vocab_size != self.vocab_size:
            raise UserError(
                f"the constraint was compiled for {self.vocab_size} tokens and the model has {vocab_size}: compile it "
                "with the Grammars of this engine"
            )
        return Matching(
            self.matcher.deep_copy(), vocab_size, self.bounds, ends=tuple(ends), held_off=params.min_tokens,
            never_ends=params.ignore_eos,
        )  # fmt: skip


class Grammars:
    """Compiles constraints for one tokenizer and engine, and keeps those that were asked for last.

    Threads of its own do the work. What they cannot finish in time is refused; llguidance counts its steps, so they
    are not lost for ever.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, end_ids: Collection[int], bounds: Bounds | None = None
    ):
        """`vocab_size` is the model's, `end_ids` are the tokens that may end an answer: `AsyncEngine.end_ids`."""
        self.bounds = Bounds() if bounds is None else bounds
        self._given = tokenizer, vocab_size, sorted(end_ids)
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[str, Compiled] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="maxstack-grammar")

    async def compile(self, constraint: Constraint) -> Compiled:
        """The grammar. Raises BadConstraint that says what is wrong with it."""
        key = self.key(constraint)
        if (known := self._find(key)) is not None:
            return known
        work = asyncio.get_running_loop().run_in_executor(self._pool, self._compiled, constraint, key)
        try:
            return await asyncio.wait_for(work, self.bounds.seconds)
        except TimeoutError:
            raise BadConstraint(
                f"compiling the {constraint.kind} took more than {self.bounds.seconds} s: give a simpler one"
            ) from None

    def compile_now(self, constraint: Constraint) -> Compiled:
        """The same in the caller's thread, for code that is not async."""
        key = self.key(constraint)
        return self._find(key) or self._compiled(constraint, key)

    def close(self) -> None:
        """Let go of the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def key(self, constraint: Constraint) -> str:
        """Equal for equal constraints. Raises BadConstraint for what is too large or no value of its kind."""
        text = f"{constraint.kind} {checked_text(constraint, self.bounds)}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def _find(self, key: str) -> Compiled | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _compiled(self, constraint: Constraint, key: str) -> Compiled:
        tokenizer, vocab_size, end_ids = self._given
        grammar = grammar_of(constraint, tokenizer, self.bounds)
        matcher = llguidance.LLMatcher(self._known_words(), grammar, log_level=0, limits=self._limits())
        done = Compiled(constraint, vocab_size, self.bounds, matcher)
        # The first mask walks the whole vocabulary: here, where nobody waits for it but this request.
        fault = matcher.get_error() if matcher.is_error() else self._first_fault(done, end_ids)
        if fault:
            raise BadConstraint(f"{constraint.kind}: {fault[:SAID]}")
        with self._lock:
            self._kept[key] = done
            while len(self._kept) > self.bounds.kept:
                self._kept.popitem(last=False)
        return done

    def _first_fault(self, done: Compiled, end_ids: Collection[int]) -> str | None:
        first = done.start(SamplingParams(), end_ids, done.vocab_size)
        if first.fault is None and not first.words_w.any():
            return "only the empty answer would do, and the tokenizer has no token that ends one"
        return first.fault

    def _known_words(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = vocabulary(*self._given)
            return self._vocabulary

    def _limits(self) -> llguidance.LLParserLimits:
        bounds = self.bounds
        return llguidance.LLParserLimits(
            initial_lexer_fuel=bounds.start_fuel,
            step_lexer_fuel=bounds.step_fuel,
            step_max_items=bounds.step_items,
            max_lexer_states=bounds.states,
            max_grammar_size=bounds.symbols,
            verbose_errors=False,
        )
