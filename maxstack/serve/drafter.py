"""A small model that guesses what a larger one says next, one token after another.

Its cache has the same pages as the large one's, so it reads every chunk of a prompt, and a page that requests share has
both. Its guess at a position is drawn with the random number of that position, as the token itself will be: where the
two models agree on the distribution they agree on the token. Steps without guesses leave gaps in its cache, which make
worse guesses and nothing else.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from maxstack.config import UserError
from maxstack.kernels.paged_attention import PageType
from maxstack.models.generation.sampling import choose
from maxstack.models.paged.forward import Chunk
from maxstack.models.paged.layer import cut
from maxstack.models.paged.pools import Pools, init_pools
from maxstack.models.transformer import Transformer, TransformerConfig
from maxstack.serve.compiled import Compiled
from maxstack.serve.drafts import Drafting
from maxstack.serve.forms import form_for
from maxstack.serve.plan import Limits, Shape
from maxstack.serve.programs import Form, RowState, Steps
from maxstack.sharding import mesh_of, on_mesh


class Drafter:
    """The small model, its cache and its programs. Used by one thread."""

    def __init__(
        self, model: Transformer, config: TransformerConfig, limits: Limits, kv_dtype: PageType,
        on: str | None = None, large_mesh: Mesh | None = None,
    ):  # fmt: skip
        """`config` is the large model's. Raises UserError for a model whose guesses it could not take."""
        if model.config.vocab_size != config.vocab_size:
            raise UserError(
                f"the draft model knows {model.config.vocab_size} tokens, the model {config.vocab_size}: its guesses "
                "must be tokens of the model"
            )
        if (mesh := mesh_of(model)) != large_mesh:
            raise UserError(
                f"the draft model lies on {devices_of(mesh)}, the model on {devices_of(large_mesh)}: load both for the "
                "same mesh"
            )
        if not limits.drafts:
            raise UserError(
                "there is a draft model, and Limits.drafts is 0: say how many tokens it guesses, 4 perhaps"
            )
        self._form, self.weights = form_for(model, on)
        self._most = limits.drafts
        self._pools: Any = None

        def empty() -> Pools:
            pools = init_pools(model.config, limits.pages, limits.page, kv_dtype)
            return pools if mesh is None else cut(pools)

        with on_mesh(mesh):
            self._empty = jax.jit(empty).lower().compile()
        self.reset()

    def reset(self) -> None:
        """An empty cache."""
        self._pools = None  # its memory first
        self._pools = self._empty()

    def add_chunk(self, table: Compiled, shape: Shape, chunk: Chunk) -> None:
        """Want the program that reads chunks of a shape."""
        key, read = ("draft chunk", *shape), partial(read_on, self._form)
        arguments = self.weights, self._pools, chunk._replace(adapters_b=None)
        if self._form.keep is None:
            table.add(key, read, *arguments, donate=(1,))
            return
        table.add((*key, "read"), read, *arguments)
        written = table.gives((*key, "read"))
        table.add((*key, "keep"), self._form.keep, self._pools, written, arguments[2], donate=(0,))

    def add_guess(self, table: Compiled, bucket: int, state: RowState, steps: Steps) -> None:
        """Want the program that guesses one token of so many rows."""
        rest, at = state._replace(drafting=None), np.int32(0)
        arguments = self.weights, self._pools, rest, state.drafting, steps, at
        if self._form.keep is None:
            table.add(("draft", bucket), partial(guess, self._form), *arguments, donate=(1, 3))
            return
        table.add(("draft", bucket, "read"), partial(guess, self._form), *arguments)
        drafting, written = table.gives(("draft", bucket, "read"))
        table.add(
            ("draft", bucket, "keep"), partial(keep, self._form), self._pools, written, rest, drafting, steps, at,
            donate=(0,),
        )  # fmt: skip

    def read(self, table: Compiled, shape: Shape, chunk: Chunk) -> None:
        """Read a chunk, as the large model does."""
        chunk, key = chunk._replace(adapters_b=None), ("draft chunk", *shape)
        if self._form.keep is None:
            self._pools = table[key](self.weights, self._pools, chunk)
            return
        written = table[*key, "read"](self.weights, self._pools, chunk)
        self._pools = table[*key, "keep"](self._pools, written, chunk)

    def guess(self, table: Compiled, bucket: int, state: RowState, steps: Steps) -> RowState:
        """The state with guesses of what rows say next. The last guess is read too, in case it is kept."""
        rest, drafting = state._replace(drafting=None), state.drafting
        for at in range(self._most + 1):
            given = rest, drafting, steps, np.int32(at)
            if self._form.keep is None:
                drafting, self._pools = table["draft", bucket](self.weights, self._pools, *given)
                continue
            new, written = table["draft", bucket, "read"](self.weights, self._pools, *given)
            self._pools = table["draft", bucket, "keep"](self._pools, written, *given)
            drafting = new
        return state._replace(drafting=drafting)


def devices_of(mesh: Mesh | None) -> str:
    """For a message."""
    return "one device" if mesh is None else f"{mesh.size} devices {dict(mesh.shape)}"


def read_on(form: Form, weights: Any, pools: Pools, chunk: Chunk) -> Any:
    """The pools with a chunk in them, or what is to be written."""
    return form.advance(weights, pools, chunk)[1]


def chunk_at(state: RowState, drafting: Drafting, steps: Steps, at: Int[Array, ""]) -> Chunk:
    """The token before guess `at`: the row's next one, or the guess before."""
    if steps.bounds_b is None:
        raise ValueError("a guess needs to know how far rows may write")
    rows = steps.rows_b
    before_b = drafting.guesses_rk[rows, jnp.maximum(at - 1, 0)]
    tokens_b = jnp.where(at == 0, state.next_r[rows], before_b)
    lengths_b = state.lengths_r[rows] + at
    active_b = (state.left_r[rows] > 0) & (lengths_b < steps.bounds_b)
    return Chunk(tokens_b[:, None], steps.table_bp, lengths_b, active_b.astype(jnp.int32), lengths_b + 1)


def guess(
    form: Form,
    weights: Any,
    pools: Pools,
    state: RowState,
    drafting: Drafting,
    steps: Steps,
    at: Int[Array, ""],
) -> tuple[Drafting, Any]:
    """One guess of each row more, and what is to be written."""
    rows, chunk = steps.rows_b, chunk_at(state, drafting, steps, at)
    x_b1d, written = form.advance(weights, pools, chunk)
    settings = jax.tree.map(lambda leaf: leaf[rows], state.settings)
    settings = settings._replace(logprobs=jnp.full_like(settings.logprobs, -1))
    chosen = choose(form.logits(weights, x_b1d)[:, 0], settings, state.seen, chunk.lengths_b + 1, rows)
    guesses_rk = drafting.guesses_rk.at[rows, at].set(chosen.tokens_b, mode="drop")
    return drafting._replace(guesses_rk=guesses_rk), written


def keep(
    form: Form,
    pools: Pools,
    written: Any,
    state: RowState,
    drafting: Drafting,
    steps: Steps,
    at: Int[Array, ""],
) -> Pools:
    """The pools with what was read for a guess."""
    assert form.keep is not None
    return form.keep(pools, written, chunk_at(state, drafting, steps, at))
