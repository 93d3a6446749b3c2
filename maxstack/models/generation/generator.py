"""A model that writes: prompts in, tokens and text out as they come."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxstack.config import UserError
from maxstack.data.tokenizer import Tokenizer
from maxstack.models.generation.checks import check_request
from maxstack.models.generation.output import Completion, Event, Row
from maxstack.models.generation.params import SamplingParams, row_settings
from maxstack.models.generation.programs import programs_for
from maxstack.models.generation.sampling import Seen
from maxstack.models.generation.state import State
from maxstack.models.transformer import Transformer

SMALLEST_CHUNK, LARGEST_CHUNK = 16, 512
"""Tokens of a prompt that are read at once; powers of two between, so that few programs are compiled."""
SMALLEST_CACHE = 128

Prompt = Sequence[int]
Params = SamplingParams | Sequence[SamplingParams]


@dataclasses.dataclass
class Session:
    """A conversation: what its last prompt and answer left in the cache is not read again.

    Give it to `stream` with one prompt at a time; the tokens that the prompt begins with and the cache has are kept.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    """The tokens in the cache."""
    state: State | None = None
    slots: int = 0
    """Tokens that the cache has room for."""

    def common(self, prompt: Prompt) -> int:
        """How many tokens of the prompt are in the cache; its last one is always read."""
        limit = min(len(self.ids), len(prompt) - 1)
        return next((i for i in range(limit) if self.ids[i] != prompt[i]), limit)


class Generator:
    """Built once for a model: it keeps the weights in the form that decodes fastest here.

    That form is a copy on a CPU: let go of the model if memory is short. Programs are kept by the model's shape, so
    that another Generator of the same shape compiles nothing.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        end_ids: Sequence[int] | None = None,
        on: str | None = None,
    ):
        """`end_ids` end a row (by default the tokenizer's `stop_ids`). `on` is the platform whose form of the programs
        is used: that at hand, unless told otherwise."""
        self.config, self.tokenizer = model.config, tokenizer
        self._programs, self._weights = programs_for(model, on)
        default = () if tokenizer is None else tokenizer.stop_ids
        self.end_ids = frozenset(default if end_ids is None else end_ids)

    def stream(
        self, prompts: Sequence[Prompt], params: Params, *, session: Session | None = None
    ) -> Iterator[Event]:
        """Each row's new tokens as they come. All rows advance together; `params` is for all or one a row.

        Raises UserError before anything is computed: for an empty prompt, one that with its answer exceeds the model's
        longest sequence, ids that are not in the vocabulary, stop strings without a tokenizer.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UserError(
                f"{len(prompts)} prompts and {len(each)} settings: give one of them a prompt, or one for all"
            )
        if session is not None and len(prompts) != 1:
            raise UserError(f"a session continues one prompt at a time, not {len(prompts)}")
        for prompt, own in zip(prompts, each, strict=True):
            self.check(prompt, own)
        return self._stream([list(prompt) for prompt in prompts], each, session) if prompts else iter(())

    def generate(self, prompts: Sequence[Prompt], params: Params) -> list[Completion]:
        """The whole answer to each prompt."""
        done = [Completion() for _ in prompts]
        for event in self.stream(prompts, params):
            done[event.row].add(event)
        return done

    def check(self, prompt: Prompt, params: SamplingParams) -> None:
        """Raise UserError for a request that cannot be served."""
        longest = self.config.max_length
        check_request(prompt, params, self.config.vocab_size, longest, tokenizer=self.tokenizer is not None)

    def _stream(
        self, prompts: list[list[int]], params: list[SamplingParams], session: Session | None
    ) -> Iterator[Event]:
        rows = [Row(i, own, self.tokenizer, self.end_ids) for i, own in enumerate(params)]
        count = power_of_two(len(prompts))
        filled = prompts + [prompts[0]] * (count - len(prompts))
        whole = params + [params[0]] * (count - len(params))
        ends, lengths = [own.ends(self.end_ids) for own in whole], [len(prompt) for prompt in filled]
        settings = jax.device_put(row_settings(whole, self.config.vocab_size, ends, lengths))
        state, slots = self._read(filled, session)
        longest, most = max(map(len, prompts)), max(own.max_tokens for own in params)
        taken: list[int] = []
        waiting, launches = None, 0
        try:
            # A step is launched before the tokens of the last one are looked at, so that the device never waits.
            for at in range(most + 1):
                launched = None
                if at < most:
                    state, slots = self._with_room(state, slots, longest + at)
                    launched, state = self._programs.step(self._weights, state, settings)
                    launches += 1
                    jax.tree.map(lambda leaf: leaf.copy_to_host_async(), launched)
                if waiting is not None:
                    chosen = jax.tree.map(np.asarray, waiting)
                    taken.append(int(chosen.tokens_b[0]))
                    yield from (event for row in rows if not row.done and (event := row.take(chosen)))
                    if all(row.done for row in rows):
                        return
                waiting = launched
        finally:
            if session is not None:
                session.ids = [*prompts[0], *taken][: len(prompts[0]) - 1 + launches]
                session.state, session.slots = state, slots

    def _read(self, prompts: list[list[int]], session: Session | None) -> tuple[State, int]:
        """The state with all of each prompt but its last token in the cache, and how many slots it has."""
        known = 0 if session is None or session.state is None else session.common(prompts[0])
        unread = np.asarray([len(prompt) - 1 - known for prompt in prompts])
        chunks = cut(int(unread.max()))
        slots = cache_size(known + sum(chunks) + 1)
        lengths = jnp.full(len(prompts), known, jnp.int32)
        ends = jnp.asarray([prompt[-1] for prompt in prompts], jnp.int32)
        caches, slots = self._caches(len(prompts), slots, session if known else None)
        state = State(caches, lengths, ends, self._seen(prompts))
        documents = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
        done = 0
        for size in chunks:
            tokens = np.zeros((len(prompts), size), np.int32)
            for row, prompt in enumerate(prompts):
                part = prompt[known + done : min(known + done + size, len(prompt) - 1)]
                tokens[row, : len(part)] = part
            counts = jnp.asarray(np.clip(unread - done, 0, size), jnp.int32)
            first = known + done == 0
            state = self._programs.read(self._weights, state, jnp.asarray(tokens), counts, documents, first)
            done += size
        return state, slots

    def _caches(self, rows: int, slots: int, session: Session | None) -> tuple[Any, int]:
        """Empty caches of so many slots, or a session's with at least as many."""
        if session is None or session.state is None:
            return self._programs.empty(rows, slots), slots
        caches, session.state = session.state.caches, None  # the next program takes their memory
        if session.slots >= slots:
            return caches, session.slots
        return self._programs.grow(caches, slots), slots

    def _seen(self, prompts: list[list[int]]) -> Seen:
        prompt_bv = np.zeros((len(prompts), self.config.vocab_size), bool)
        for row, prompt in enumerate(prompts):
            prompt_bv[row, prompt] = True
        return Seen(jnp.asarray(prompt_bv), jnp.zeros(prompt_bv.shape, jnp.int32))

    def _with_room(self, state: State, slots: int, needed: int) -> tuple[State, int]:
        """The state with at least `needed` slots."""
        if needed <= slots:
            return state, slots
        slots = cache_size(needed)
        return state._replace(caches=self._programs.grow(state.caches, slots)), slots


def cut(tokens: int) -> list[int]:
    """Sizes of the chunks in which a prompt is read: whole ones, and a power of two for the rest."""
    whole, rest = divmod(tokens, LARGEST_CHUNK)
    return [LARGEST_CHUNK] * whole + ([max(SMALLEST_CHUNK, power_of_two(rest))] if rest else [])


def power_of_two(least: int) -> int:
    """The smallest power of two from `least` on."""
    return 1 << (least - 1).bit_length()


def cache_size(least: int) -> int:
    """Slots of a cache for `least` tokens: powers of two and halfway between, so that few programs are compiled."""
    size = max(SMALLEST_CACHE, power_of_two(least))
    return 3 * size // 4 if size > SMALLEST_CACHE and 3 * size // 4 >= least else size
