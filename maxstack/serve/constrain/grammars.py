"""Constraints compiled into grammars, beside the event loop and the engine, within bounds."""

import asyncio
import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier

import llguidance

from maxstack.data.tokenizer import Tokenizer
from maxstack.models.generation.params import SamplingParams
from maxstack.serve.constrain.constraint import BadConstraint, Bounds, Constraint
from maxstack.serve.constrain.matching import Compiled, Matching
from maxstack.serve.constrain.sources import checked_text, grammar_of
from maxstack.serve.constrain.vocabulary import vocabulary

THREADS = 2
STACK_BYTES = 256 << 20
"""Of a thread; memory only where it is used."""
WALK = 16
"""Steps that are tried when a grammar is compiled."""
SAID = 500
"""Characters of llguidance's own words that go into an error."""


def roomy_threads() -> ThreadPoolExecutor:
    """Threads with deep stacks: rules that refer to each other are followed by recursion."""
    pool, together = ThreadPoolExecutor(THREADS, thread_name_prefix="maxstack-grammar"), Barrier(THREADS)
    usual = threading.stack_size(STACK_BYTES)
    try:
        wait([pool.submit(together.wait) for _ in range(THREADS)])  # they begin when they are first needed
    finally:
        threading.stack_size(usual)
    return pool


def said(fault: object) -> str:
    """llguidance's words on one line, not too many of them."""
    return " ".join(str(fault).replace("<non-verbose/>", "").split())[:SAID]


def walk(matching: Matching, end_ids: Collection[int], steps: int = WALK) -> float:
    """Follow a grammar for some steps, now by its first token and now by its last; the processor's seconds for
    the longest one."""
    longest = 0.0
    for step in range(steps):
        ids = [i for i in matching.allowed() if i not in end_ids]
        if matching.fault is not None or matching.over or not ids:
            break
        begun = time.thread_time()
        matching.take([ids[-(step % 2)]])
        longest = max(longest, time.thread_time() - begun)
    return longest


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
        self._pool = roomy_threads()

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
        """The same for code that is not async; it waits as long as it takes."""
        key = self.key(constraint)
        return self._find(key) or self._pool.submit(self._compiled, constraint, key).result()

    def close(self) -> None:
        """Let go of the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def key(self, constraint: Constraint) -> str:
        """Equal for equal constraints. Raises BadConstraint for what is too large or no value of its kind."""
        text = json.dumps(
            [constraint.kind, constraint.after, constraint.opening, checked_text(constraint, self.bounds)]
        )
        return hashlib.sha256(text.encode()).hexdigest()

    def _find(self, key: str) -> Compiled | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _compiled(self, constraint: Constraint, key: str) -> Compiled:
        tokenizer, vocab_size, _ = self._given
        try:
            grammar = grammar_of(constraint, tokenizer, self.bounds)
        except BadConstraint:
            raise
        except ValueError as error:  # llguidance's own
            raise BadConstraint(f"{constraint.kind}: {said(error)}") from error
        matcher = llguidance.LLMatcher(self._known_words(), grammar, log_level=0, limits=self._limits())
        done = Compiled(constraint, vocab_size, self.bounds, matcher)
        fault = matcher.get_error() if matcher.is_error() else self._tried(done)
        if fault:
            raise BadConstraint(f"{constraint.kind}: {said(fault)}")
        with self._lock:
            self._kept[key] = done
            while len(self._kept) > self.bounds.kept:
                self._kept.popitem(last=False)
        return done

    def _tried(self, done: Compiled) -> str | None:
        """What goes wrong on some ways into the grammar, here, where nobody waits for it but this request.

        The first walk makes what later ones share, so only the second one says how long a step takes.
        """
        _, vocab_size, end_ids = self._given
        for timed in (False, True):
            matching = done.start(SamplingParams(), end_ids, vocab_size)
            longest = walk(matching, end_ids)
            if matching.fault is not None:
                return matching.fault
            if timed and longest > self.bounds.step_s:
                return f"a step takes {longest * 1e3:.0f} ms, at most {self.bounds.step_s * 1e3:.0f} are spent on one"
        return None

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
