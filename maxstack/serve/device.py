"""The device's side of the server: weights, pools and rows; plans in, tokens out.

`launch` returns at once, and what the device found is asked for later, so that the host works meanwhile. The page
tables and what rows were given are kept on the host too, as numpy; each launch takes what it needs of them.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from maxstack.kernels.paged_attention import PageType
from maxstack.models import adapters
from maxstack.models.generation.matrix import native
from maxstack.models.generation.params import SamplingParams, row_settings
from maxstack.models.paged.forward import Chunk as Tokens
from maxstack.models.paged.layer import cut
from maxstack.models.paged.pools import init_pools, untouched_pools
from maxstack.models.transformer import TransformerConfig
from maxstack.serve import drafts, programs, rooms, speculation
from maxstack.serve.compiled import Compiled, shape_of
from maxstack.serve.constrain.matching import Matching
from maxstack.serve.drafter import Drafter
from maxstack.serve.hosts.calls import Calls
from maxstack.serve.hosts.leader import Leader, in_step
from maxstack.serve.plan import Chunk, Limits, Plan, Shape, Start
from maxstack.serve.programs import (
    Form,
    Prompts,
    Steps,
    Told,
    Weights,
)
from maxstack.serve.replay import Replays
from maxstack.serve.results import Found, Launched, results
from maxstack.sharding import mesh_of

# Arrays on their way to the device: programs take them as its own, and their types say so.
arrays: Any = np
MASKS = 8
"""Rows whose masks are written at once, so that one program does for all."""
GUESSED = 128
"""Places of a step with guesses at most: with more rows a device has enough to do without."""
HELD = 3
"""Arguments of a step's program that the device holds: weights, pools and rows."""
NEUTRAL = SamplingParams(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the device has to know of a request: `Request.params`."""

    sampling: SamplingParams
    ends: tuple[int, ...]
    """Token ids that end it."""
    matching: Matching | None = None
    """The form that its answer must have."""
    pooled: bool = False
    """Its prompt's hidden states are wanted."""
    adapter: int = 0
    """Its adapter's number, 0 for none."""

    @property
    def penalised(self) -> bool:
        """Whether its tokens depend on those before by penalties."""
        s = self.sampling
        return bool(s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty)


NOBODY = Asked(NEUTRAL, ())


class Device:
    """Weights, pools and rows of one model. Used by one thread."""

    _pools: Any = None
    _state: Any = None
    _leader: Leader | None = None

    def __init__(
        self, config: TransformerConfig, form: Form, weights: Weights, limits: Limits, kv_dtype: PageType,
        buckets: Sequence[int] | None = None, drafter: Drafter | None = None,
    ):  # fmt: skip
        self._drafter = drafter
        self.config, self.limits, self.weights = config, limits, weights
        self._form = form
        self._table = arrays.full((limits.rows + 1, limits.table_width), -1, np.int32)
        self._generated = arrays.zeros(limits.rows + 1, np.int32)
        self._adapters = arrays.zeros(limits.rows + 1, np.int32) if isinstance(weights, tuple) else None
        self._room = jax.tree.map(shape_of, weights[1]) if isinstance(weights, tuple) else None
        mesh = mesh_of(weights)
        self._programs = Compiled(mesh)
        self.buckets = buckets_up_to(limits.rows) if buckets is None else tuple(sorted(buckets))
        self._replays = None
        if limits.invariant:
            self.buckets, self._replays = (limits.rows,), Replays(limits.rows + 1)
        self.guessing = tuple(b for b in self.buckets if b * (1 + limits.drafts) <= GUESSED)
        """Numbers of rows that steps with guesses are compiled for, where there are any."""
        settings = row_settings([NEUTRAL], config.vocab_size)

        def empty():
            make = untouched_pools if mesh is None and native() else init_pools
            pools = make(config, limits.pages, limits.page, kv_dtype)
            history = limits.max_length + 1 if limits.drafts else 0
            guesses = limits.drafts if drafter is not None else 0
            rows = programs.empty_rows(limits.rows + 1, config.vocab_size, settings, history, guesses)
            return pools if mesh is None else cut(pools), rows

        self._programs.add("empty", empty)
        self._programs.compile()
        self.reset()

    def reset(self) -> None:
        """Empty pools and rows: at the start, and when a failed step has taken them along."""
        self._do("empty")
        self._table[:] = -1

    def warm_up(self, told: Callable[[int, int], None] | None = None) -> None:
        """Compile every program that `launch` may want; `told` hears how many are done, and of how many."""
        table, held = self._programs, (self._pools, self._state)
        if self._room is not None:
            axis = int(self._form.stacked)
            new = jax.tree.map(lambda leaf: np.zeros(np.delete(leaf.shape, axis), leaf.dtype), self._room)
            put_in = partial(adapters.put, axis=axis)
            table.add("adapter", put_in, self.weights[1], np.int32(0), new, donate=(0,))
        rows, words = self._nobody_bound()
        table.add("allow", programs.allow, self._state.allowed_rw, rows, words, donate=(0,))
        table.add("seat", programs.seat, self._state, np.int32(0), *self._nothing_seen(), donate=(0,))
        for bucket in self.buckets:
            example = self._nobodys_steps(bucket)
            self._add_pair(("decode", bucket), programs.decode_read, programs.decode_keep, held, example)
        if most := self.limits.drafts:
            row = np.zeros(self.limits.max_length + 1, np.int32)
            table.add("recall", drafts.recalled, self._state.drafting, np.int32(0), row, donate=(0,))
            read, keep = partial(speculation.guesses_read, most), partial(speculation.guesses_keep, most)
            for bucket in self.guessing:
                steps = self._nobodys_steps(bucket)
                self._add_pair(("guess", bucket), read, keep, held, steps)
                if self._drafter is not None:
                    self._drafter.add_guess(table, bucket, self._state, steps)
        if self._form.keep is not None and any(len(shape) == 3 for shape in self.limits.chunks):
            raise ValueError(
                f"limits: chunks {self.limits.chunks} side by side need pools that are written in place; without the "
                "C++ part give pairs (rows, tokens)"
            )
        for shape in self.limits.chunks:
            nobody = self._prompts((), shape)
            self._add_pair(("chunk", *shape), programs.prompts_read, programs.prompts_keep, held, nobody)
            if self._drafter is not None:
                self._drafter.add_chunk(table, shape, nobody.chunk)
        table.compile(told=told)

    def _add_pair(self, key: Any, read: Any, keep: Any, held: tuple, example: Any) -> None:
        """The programs of a step: one that reads and writes, or one for each."""
        form, (pools, state) = self._form, held
        if form.keep is None:

            def both(weights, pools, state, given):
                said, written = read(form, weights, pools, state, given)
                return said, *keep(form, pools, state, given, said, written)

            self._programs.add(key, both, self.weights, pools, state, example, donate=(1, 2))
            return
        self._programs.add((*key, "read"), partial(read, form), self.weights, pools, state, example)
        said, written = self._programs.gives((*key, "read"))
        self._programs.add(
            (*key, "keep"), partial(keep, form), pools, state, example, said, written, donate=(0, 1)
        )

    def _do(self, key: Any, *given: Any) -> Any:
        """A call that changes what the device holds, here and wherever else the model lies. What has been told and then
        fails leaves no way to know what others have done."""
        if self._leader is None:
            return self.call(key, given)
        self._leader.tell(key, given)
        with in_step():
            return self.call(key, given)

    def call(self, key: Any, given: tuple) -> Any:
        """A program, on what the device holds and what the host gives it; what it says, if anything."""
        table, state = self._programs, self._state
        match key:
            case "empty":
                self._pools = self._state = state = None  # their memory first
                self._pools, self._state = table[key]()
                if self._drafter is not None:
                    self._drafter.reset()
            case "adapter":
                self.weights = self.leaves, table[key](self.weights[1], *given)
            case "seat":
                self._state = table[key](state, *given)
            case "recall":
                self._state = state._replace(drafting=table[key](state.drafting, *given))
            case "allow":
                self._state = state._replace(allowed_rw=table[key](state.allowed_rw, *given))
            case ("guess", bucket) if self._drafter is not None:
                self._state = self._drafter.guess(table, bucket, state, *given)
                return self._run(key, *given)
            case ("chunk", *shape) if self._drafter is not None:
                said = self._run(key, *given)
                self._drafter.read(table, tuple(shape), given[0].chunk)
                return said
            case _:
                return self._run(key, *given)
        return None

    def calls(self) -> Calls:
        """What `call` may be asked for."""
        held = {"empty": 0, "adapter": 1, "seat": 1, "recall": 1, "allow": 1}
        own = [key for key in self._programs if key in held or key[0] in ("chunk", "decode", "guess")]
        return Calls({key: self._programs.shapes[key][held.get(key, HELD) :] for key in own})

    def lead(self, leader: Leader) -> None:
        """From here on others are told of each call; waits until they are ready. Once all is compiled."""
        leader.wait(self.calls())
        self._leader = leader

    def _run(self, key: Any, given: Any) -> Any:
        """What a step has to say; pools and rows move on."""
        if self._form.keep is None:
            said, self._pools, self._state = self._programs[key](
                self.weights, self._pools, self._state, given
            )
            return said
        said, written = self._programs[*key, "read"](self.weights, self._pools, self._state, given)
        self._pools, self._state = self._programs[*key, "keep"](
            self._pools, self._state, given, said, written
        )
        return said

    def fitted(self, adapter: adapters.Adapter) -> Any:
        """An adapter for `put_adapter`. Any thread may ask."""
        if self._room is None:
            raise ValueError("the device has no room for adapters")
        return rooms.filled(adapter, self._room, self.config, stacked=self._form.stacked)

    def put_adapter(self, slot: int, fitted: Any) -> None:
        """Put an adapter in a place, counted from 0."""
        self._do("adapter", np.int32(slot), fitted)

    @property
    def leaves(self) -> list[jax.Array]:
        """The model's weights, without the room for adapters."""
        return self.weights[0] if self._room is not None else self.weights

    def put_weights(self, leaves: list[jax.Array]) -> None:
        """Weights of the same shapes in the place of the old ones."""
        self.weights = leaves if self._room is None else (leaves, self.weights[1])

    def launch(self, plan: Plan) -> Launched:
        """Start the device on a plan."""
        for start in plan.starts:
            self._seat(start)
        for changed in plan.tables:
            self._table[changed.row, : len(changed.pages)] = changed.pages
            self._table[changed.row, len(changed.pages) :] = -1
        self._allow(plan)
        launched = Launched(plan)
        if plan.chunk_shape is not None:
            given = self._prompts(plan.chunks, plan.chunk_shape)
            launched.chunks = self._do(("chunk", *plan.chunk_shape), given)
            _hurry(launched.chunks[0])
        if plan.decodes:
            kind, given = ("guess" if plan.drafts else "decode"), self._decoding(plan)
            for step in range(plan.steps):
                said = self._do((kind, len(given[0])), self._steps(*given, step))
                _hurry(said)
                launched.steps.append(said)
        return launched

    def results(self, launched: Launched) -> Found:
        """What the plan gave; waits for it."""
        if self._leader is None:
            return results(launched)
        with in_step():
            return results(launched)

    def costs(self) -> dict[int, float]:
        """The time of a step with guesses over that of one without, by number of rows."""
        return {
            bucket: self._seconds("guess", bucket) / self._seconds("decode", bucket)
            for bucket in self.guessing
        }

    def _seconds(self, kind: str, bucket: int) -> float:
        """Of a step with nobody in it, the best of three after the first."""
        times = []
        for _ in range(4):
            began = time.perf_counter()
            jax.block_until_ready(self._do((kind, bucket), self._nobodys_steps(bucket)))
            jax.block_until_ready(self._state)
            times.append(time.perf_counter() - began)
        return min(times[1:])

    def _seat(self, start: Start) -> None:
        """A row gets a request."""
        asked: Asked = start.request.params
        # What is said again counts as it is said, as it did the first time.
        before = start.tokens if self._replays is None else ()
        self._generated[start.row] = len(before)
        if self._replays is not None:
            self._replays.seat(start)
        if self._adapters is not None:
            self._adapters[start.row] = asked.adapter
        if self.limits.drafts:
            known = (*start.request.prompt, *start.tokens)
            row = arrays.zeros(self.limits.max_length + 1, np.int32)
            row[: len(known)] = known
            self._do("recall", np.int32(start.row), row)
        if asked.penalised:
            prompt_v, counts_v = self._nothing_seen()
            prompt_v[list(start.request.prompt)] = True
            np.add.at(counts_v, list(before), 1)
            self._do("seat", np.int32(start.row), prompt_v, counts_v)

    def _allow(self, plan: Plan) -> None:
        """Which tokens bound rows may say in this plan. Few are, in most plans none."""
        parts = [*plan.decodes, *(chunk for chunk in plan.chunks if chunk.last)]
        bound = [(part.row, part.request.params.matching) for part in parts]
        bound = [(row, matching) for row, matching in bound if matching is not None]
        for i in range(0, len(bound), MASKS):
            rows, words = self._nobody_bound()
            for j, (row, matching) in enumerate(bound[i : i + MASKS]):
                rows[j], words[j] = row, matching.words_w
            self._do("allow", rows, words)

    def _nobody_bound(self) -> tuple[Any, Any]:
        """Nobody's row, and its words, as often as masks are written at once."""
        words = programs.words_for(self.config.vocab_size)
        return arrays.full(MASKS, self.limits.rows, np.int32), arrays.zeros((MASKS, words), np.uint32)

    def _nothing_seen(self) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(self.config.vocab_size, bool), np.zeros(self.config.vocab_size, np.int32)

    def _decoding(self, plan: Plan) -> tuple[Any, Any, Any, Any]:
        """Rows of a bucket, filled up with nobody's, how many steps each takes part in (with guesses: tokens it may
        gain), the positions that its pages cover, and, by step, what it says again."""
        count, buckets = len(plan.decodes), self.guessing if plan.drafts else self.buckets
        bucket = next(size for size in buckets if size >= count)
        rows, counts = arrays.full(bucket, self.limits.rows, np.int32), arrays.zeros(bucket, np.int32)
        bounds = arrays.zeros(bucket, np.int32)
        rows[:count] = [decode.row for decode in plan.decodes]
        counts[:count] = [decode.count for decode in plan.decodes]
        bounds[:count] = [decode.length + decode.count - 1 for decode in plan.decodes]
        known = None if self._replays is None else self._replays.of_steps(plan, bucket)
        return rows, counts, bounds, known

    def _steps(self, rows: Any, counts: Any, bounds: Any, known: Any, step: int) -> Steps:
        bounds = bounds if self.limits.drafts else None
        known = None if known is None else known[step]
        return Steps(
            rows, self._table[rows], counts, arrays.int32(step), self._adapters_of(rows), bounds, known
        )

    def _nobodys_steps(self, bucket: int) -> Steps:
        rows, nothing = arrays.full(bucket, self.limits.rows, np.int32), arrays.zeros(bucket, np.int32)
        return self._steps(rows, nothing, nothing, None if self._replays is None else nothing[None], 0)

    def _adapters_of(self, rows: Any) -> Any:
        return None if self._adapters is None else self._adapters[rows]

    def _prompts(self, chunks: Sequence[Chunk], shape: Shape) -> Prompts:
        """Chunks as arrays of a shape, filled up with nobody's."""
        b, t = shape[:2]
        rows = arrays.full(b, self.limits.rows, np.int32)
        last, bound, pooled = (arrays.zeros(b, bool) for _ in range(3))
        lengths, counts, documents, left = (arrays.zeros(b, np.int32) for _ in range(4))
        tokens, following = arrays.zeros((b, t), np.int32), arrays.full((b, t), -1, np.int32)
        for i, chunk in enumerate(chunks):
            request = chunk.request
            rows[i], lengths[i], counts[i] = chunk.row, chunk.start, chunk.count
            tokens[i, : chunk.count] = chunk.tokens
            documents[i], bound[i] = len(request.prompt), request.params.matching is not None
            last[i] = chunk.last and request.max_tokens > 0
            left[i] = request.max_tokens - self._generated[chunk.row]
            pooled[i] = request.params.pooled
            if request.params.sampling.prompt_logprobs is not None:
                after = request.prompt[chunk.start + 1 : chunk.end + 1]
                following[i, : len(after)] = after
        asked = [chunk.request.params for chunk in chunks] + [NOBODY] * (b - len(chunks))
        settings = row_settings(
            [one.sampling for one in asked],
            self.config.vocab_size,
            [one.ends for one in asked],
            documents.tolist(),
        )
        chunk = Tokens(tokens, self._table[rows], lengths, counts, documents, self._adapters_of(rows))
        known = None if self._replays is None else self._replays.of_chunks(chunks, b)
        return Prompts(
            rows, chunk, last, left, settings, bound, following, pooled, packed(shape, chunks), known
        )


def packed(shape: Shape, chunks: Sequence[Chunk]) -> Any:
    """Where the chunks' tokens stand in a grid of this shape, one behind the other; its size for places of nobody. None
    for a shape that is computed as a grid."""
    if len(shape) == 2:
        return None
    rows, tokens, count = shape
    found = arrays.full(count, rows * tokens, np.int32)
    at = 0
    for i, chunk in enumerate(chunks):
        found[at : at + chunk.count] = np.arange(i * tokens, i * tokens + chunk.count)
        at += chunk.count
    return found


def _hurry(said: Told) -> None:
    """Have the tokens copied to the host as soon as they are there."""
    said.tokens_b.copy_to_host_async()
    said.status_b.copy_to_host_async()


def buckets_up_to(rows: int) -> tuple[int, ...]:
    """Numbers of rows that decode programs are compiled for: powers of two, and all of them. Not two: while weights are
    what takes time, two rows cost what four do."""
    return (*(1 << i for i in range((rows - 1).bit_length()) if i != 1), rows)
