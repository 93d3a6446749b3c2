"""Cross-entropy a chunk of tokens at a time, as XLA compiles it.

Three programs share the body of one chunk: losses alone; losses with their gradients (`weighted_loss` under
differentiation, where each token's cotangent is known beforehand up to one factor); gradients for given
cotangents, with the logits made again (`token_losses`). Each runs on local arrays, under `jax.shard_map` when
there is a mesh; the custom derivatives stand outside of it, so that every sum over devices is written here.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from maxstack.kernels import tiles
from maxstack.kernels.cross_entropy.layout import Layout, Options
from maxstack.kernels.dispatch import chip

CHUNK_SHARE, LEAST_BYTES = 16, 2**26
MOST_BYTES_ON_CPU, MOST_BYTES = 2**28, 2**30
"""Float32 logits of one chunk by default: a sixteenth of all, between these bounds. Each chunk also reads w and reads
and writes the whole float32 gradient of w once, hence the larger bound where products are fast against memory."""
PIECE_COLUMNS = 4096
"""Of the gradient of w on a CPU, added at a time."""


def chunk_of(tokens: int, w_dv: Array, options: Options) -> int:
    """Tokens a chunk: as asked for, else what the tables have or as many as the bytes above hold; then evened out over
    the chunks."""
    most = options.chunk or _usual_chunk(tokens, w_dv)
    return -(-tokens // -(-tokens // most))


def _usual_chunk(tokens: int, w_dv: Array) -> int:
    d, vocabulary = w_dv.shape
    bound = MOST_BYTES_ON_CPU if chip().platform == "cpu" else MOST_BYTES
    bytes_ = min(max(4 * tokens * vocabulary // CHUNK_SHARE, LEAST_BYTES), bound)
    usual = max(bytes_ // (4 * vocabulary), 1)
    shape = {"t": tiles.about(tokens), "d": tiles.about(d), "v": tiles.about(vocabulary)}
    axes = {"chunk": tuple(max(usual * part // 4, 1) for part in (1, 2, 4, 8, 16))}

    def fault(sizes: tiles.Sizes) -> str | None:
        if sizes["chunk"] <= 4 * usual:
            return None
        return f"logits of {sizes['chunk']} tokens take more than 4 times the usual {4 * usual * vocabulary} bytes"

    rule = {"chunk": usual}
    return tiles.chosen("cross_entropy.xla", w_dv.dtype, shape, rule, axes=axes, fault=fault)["chunk"]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weighted_loss(
    options: Options,
    layout: Layout | None,
    x_td: Float[Array, "*t d"],
    w_dv: Float[Array, "d v"],
    labels_t: Int[Array, "*t"],
    weights_t: Float[Array, "*t"],
) -> tuple[Float[Array, ""], Float[Array, "*t"], Float[Array, "*t"]]:
    """Σ weight · (nll + z_loss · lse²), nll and lse. Only the first is differentiable."""
    run = partial(_losses, options, layout)
    if layout is not None:
        run = _on_mesh(layout, run, (layout.x, layout.w, layout.t, layout.t), (layout.t, layout.t))
    nll, lse = run(x_td, w_dv, labels_t, weights_t)
    return jnp.sum(weights_t * _loss(options, nll, lse)), nll, lse


def _loss(options, nll, lse):
    return nll + options.z_loss * lse**2 if options.z_loss else nll


def _weighted_loss_fwd(options, layout, x_td, w_dv, labels_t, weights_t):
    if not (x_td.perturbed or w_dv.perturbed):
        outputs = weighted_loss(options, layout, x_td.value, w_dv.value, labels_t.value, weights_t.value)
        return outputs, (None, None, *outputs[1:])
    run = partial(_losses_and_gradients, options, layout, w_dv.perturbed)
    if layout is not None:
        w_out = layout.w if w_dv.perturbed else None
        run = _on_mesh(
            layout, run, (layout.x, layout.w, layout.t, layout.t), (layout.t, layout.t, layout.x, w_out)
        )
    nll, lse, dx, dw = run(x_td.value, w_dv.value, labels_t.value, weights_t.value)
    return (jnp.sum(weights_t.value * _loss(options, nll, lse)), nll, lse), (dx, dw, nll, lse)


def _weighted_loss_bwd(options, layout, kept, cotangents):
    dx, dw, nll, lse = kept
    scale = cotangents[0]
    if isinstance(scale, SymbolicZero):
        scale = jnp.zeros((), nll.dtype)
    dx, dw = (None if g is None else (g * scale).astype(g.dtype) for g in (dx, dw))
    return dx, dw, None, scale * _loss(options, nll, lse)


weighted_loss.defvjp(_weighted_loss_fwd, _weighted_loss_bwd, symbolic_zeros=True)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def token_losses(
    options: Options,
    layout: Layout | None,
    x_td: Float[Array, "*t d"],
    w_dv: Float[Array, "d v"],
    labels_t: Int[Array, "*t"],
) -> tuple[Float[Array, "*t"], Float[Array, "*t"]]:
    """Negative log-probability and log-sum-exp of each token, both differentiable."""
    run = partial(_losses, options, layout)
    if layout is not None:
        run = _on_mesh(layout, run, (layout.x, layout.w, layout.t), (layout.t, layout.t))
    return run(x_td, w_dv, labels_t)


def _token_losses_fwd(options, layout, x_td, w_dv, labels_t):
    nll, lse = token_losses(options, layout, x_td, w_dv, labels_t)
    return (nll, lse), (x_td, w_dv, labels_t, lse)


def _token_losses_bwd(options, layout, kept, cotangents):
    run = partial(_gradients, options, layout)
    if layout is not None:
        run = _on_mesh(layout, run, (layout.x, layout.w, *[layout.t] * 4), (layout.x, layout.w))
    return (*run(*kept, *cotangents), None)


token_losses.defvjp(_token_losses_fwd, _token_losses_bwd)


def _on_mesh(layout: Layout, run, in_specs, out_specs):
    # check_vma is off: the types of a scan's carry would otherwise need every axis named by hand.
    return jax.shard_map(run, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


# What follows sees local arrays only.


def _losses(options, layout, x_td, w_dv, labels_t, weights_t=None):
    w_dv = _gathered(layout, w_dv)

    def body(carry, x_cd, _, labels_c):
        return carry, _statistics(layout, _logits(options, x_cd, w_dv), labels_c)

    return _over_chunks(options, layout, body, (), x_td, w_dv, labels_t, weights_t=weights_t)[1]


def _losses_and_gradients(options, layout, with_dw, x_td, w_dv, labels_t, weights_t):
    w_dv = _gathered(layout, w_dv)

    def body(dw, x_cd, x_dc, labels_c, weights_c):
        logits_cv = _logits(options, x_cd, w_dv)
        nll_c, lse_c = _statistics(layout, logits_cv, labels_c)
        on_p = weights_c * (1 + 2 * options.z_loss * lse_c)
        dw, dx = _product_rule(
            options, layout, dw, x_cd, x_dc, w_dv, logits_cv, labels_c, lse_c, on_p, weights_c
        )
        return dw, (nll_c, lse_c, dx)

    dw = jnp.zeros(w_dv.shape, weights_t.dtype) if with_dw else None
    dw, (nll, lse, dx) = _over_chunks(
        options, layout, body, dw, x_td, w_dv, labels_t, weights_t, weights_t=weights_t
    )
    return nll, lse, *_summed(layout, dx, dw, x_td, w_dv)


def _gradients(options, layout, x_td, w_dv, labels_t, lse_t, dnll_t, dlse_t):
    w_dv = _gathered(layout, w_dv)

    def body(dw, x_cd, x_dc, labels_c, lse_c, dnll_c, dlse_c):
        logits_cv = _logits(options, x_cd, w_dv)
        on_p = dnll_c + dlse_c
        return _product_rule(options, layout, dw, x_cd, x_dc, w_dv, logits_cv, labels_c, lse_c, on_p, dnll_c)

    dw = jnp.zeros(w_dv.shape, lse_t.dtype)
    dw, dx = _over_chunks(options, layout, body, dw, x_td, w_dv, labels_t, lse_t, dnll_t, dlse_t)
    return _summed(layout, dx, dw, x_td, w_dv)


def _over_chunks(options, layout, body, carry, x_td, w_dv, *per_token, weights_t=None):
    """Run `body(carry, x_cd, x_dc, *per_token) -> (carry, per-token outputs)` over chunks of the local tokens.

    With `weights_t`, tokens of weight 0 are put behind the others, and chunks of nothing else are left out: there the
    outputs are 0.
    """
    lead, d = x_td.shape[:-1], x_td.shape[-1]
    tokens = per_token[0].size
    chunk = chunk_of(tokens, w_dv, options)
    chunks = -(-tokens // chunk)
    pad = chunks * chunk - tokens
    source = place = weighed = None
    if chunks > 1 and weights_t is not None:
        source, place, weighed = _weighed_first(layout, weights_t.reshape(-1))

    def cut(a, *rest):
        flat = a.reshape(tokens, *rest)
        flat = flat if source is None else flat[source]
        # Padded tokens have weights and cotangents of zero, hence no gradient; their outputs are dropped.
        return jnp.pad(flat, ((0, pad), *((0, 0) for _ in rest))).reshape(chunks, chunk, *rest)

    x_ncd = cut(x_td, d)
    # x transposed is made here, outside of the scan: XLA:CPU multiplies bf16 fast only when the left operand's last
    # dimension is the contracted one, and inside the loop it would fold a transpose back into the product.
    xs = (x_ncd, jnp.swapaxes(x_ncd, 1, 2), *(cut(a) for a in per_token))
    if chunks == 1:
        carry, out = body(carry, *(a[0] for a in xs))
        out = jax.tree.map(lambda a: a[None], out)
    elif weighed is None:
        carry, out = jax.lax.scan(lambda c, xs: body(c, *xs), carry, xs)
    else:
        carry, out = _over_first(-(-weighed // chunk), body, carry, xs)

    def restore(a):
        rest = a.shape[2:]
        flat = a.reshape(chunks * chunk, *rest)
        flat = flat[:tokens] if place is None else flat[place]
        return flat.reshape(*lead, *rest)

    return carry, jax.tree.map(restore, out)


def _weighed_first(layout: Layout | None, weights_t):
    """(token of each place, place of each token, number of tokens with a weight), these being put first, in order.

    The number is the largest of all devices where a loop's body waits for others: all have to make the same turns.
    """
    weighed_t = weights_t != 0
    count = jnp.sum(weighed_t, dtype=jnp.int32)
    place_t = jnp.where(weighed_t, jnp.cumsum(weighed_t) - 1, count + jnp.cumsum(~weighed_t) - 1)
    source_t = jnp.zeros_like(place_t).at[place_t].set(jnp.arange(place_t.size), unique_indices=True)
    if layout is not None and layout.vocab:
        count = jax.lax.pmax(count, layout.mesh.axis_names)
    return source_t, place_t, count


def _over_first(count, body, carry, xs):
    """`jax.lax.scan` over the first `count` of `xs` alone; the other outputs are 0. Not to be differentiated."""
    shapes = jax.eval_shape(lambda carry, xs: body(carry, *(x[0] for x in xs))[1], carry, xs)
    outputs = jax.tree.map(lambda shape: jnp.zeros((xs[0].shape[0], *shape.shape), shape.dtype), shapes)

    def turn(i, state):
        carry, outputs = state
        carry, out = body(carry, *(jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in xs))
        return carry, jax.tree.map(lambda all_, one: all_.at[i].set(one), outputs, out)

    return jax.lax.fori_loop(0, count, turn, (carry, outputs))


def _logits(options: Options, x_cd, w_dv):
    """Soft-capped logits, summed in float32 or wider."""
    wide = jnp.promote_types(x_cd.dtype, jnp.float32)
    logits_cv = jnp.einsum("cd,dv->cv", x_cd, w_dv, preferred_element_type=wide)
    return logits_cv if options.softcap is None else options.softcap * jnp.tanh(logits_cv / options.softcap)


def _statistics(layout: Layout | None, logits_cv, labels_c):
    """Negative log-probability of the label and log-sum-exp, over every device's part of the vocabulary."""
    top_c = jnp.max(logits_cv, axis=1)
    if layout is not None and layout.vocab:
        top_c = jax.lax.pmax(top_c, layout.vocab)
    total_c = jnp.sum(jnp.exp(logits_cv - top_c[:, None]), axis=1)
    # A gather: a masked sum would write and read all logits once more. Labels of other devices count as 0.
    column_c = labels_c - _first(layout, logits_cv)
    here_c = (column_c >= 0) & (column_c < logits_cv.shape[1])
    label_c = jnp.take_along_axis(logits_cv, jnp.where(here_c, column_c, 0)[:, None], axis=1)[:, 0]
    label_c = jnp.where(here_c, label_c, 0)
    if layout is not None and layout.vocab:
        total_c, label_c = jax.lax.psum((total_c, label_c), layout.vocab)
    lse_c = top_c + jnp.log(total_c)
    return lse_c - label_c, lse_c


def _first(layout: Layout | None, logits_cv):
    """Index in the whole vocabulary of the first local column."""
    if layout is None or not layout.vocab:
        return 0
    return jax.lax.axis_index(layout.vocab) * logits_cv.shape[1]


def _product_rule(options, layout, dw, x_cd, x_dc, w_dv, logits_cv, labels_c, lse_c, on_p_c, on_label_c):
    """(dw + xᵀ·dlogits, dlogits·wᵀ) with dlogits = on_p · softmax - on_label · one-hot; dw None is left out."""
    dlogits_cv = on_p_c[:, None] * jnp.exp(logits_cv - lse_c[:, None])
    hit_cv = (labels_c - _first(layout, logits_cv))[:, None] == jnp.arange(logits_cv.shape[1])
    dlogits_cv = dlogits_cv - jnp.where(hit_cv, on_label_c[:, None], 0)
    if options.softcap is not None:
        dlogits_cv = dlogits_cv * (1 - (logits_cv / options.softcap) ** 2)
    wide = logits_cv.dtype
    dlogits_cv = dlogits_cv.astype(x_cd.dtype)
    partial_dx = layout is not None and layout.vocab
    # A partial sum stays wide until it has met the other devices' parts.
    dx_cd = jnp.einsum(
        "cv,dv->cd", dlogits_cv, w_dv, preferred_element_type=wide if partial_dx else x_cd.dtype
    )
    if dw is not None:
        dw = _plus_product(dw, x_dc, dlogits_cv)
    return dw, dx_cd


def _plus_product(sum_dv, x_dc, y_cv):
    """sum + x·y. On a CPU by ranges of columns: XLA makes the whole product there first, as large as the sum."""

    def plus(sum_dv, y_cv):
        return sum_dv + jnp.einsum("dc,cv->dv", x_dc, y_cv, preferred_element_type=sum_dv.dtype)

    columns = y_cv.shape[1]
    pieces = columns // PIECE_COLUMNS
    if chip().platform != "cpu" or pieces < 2:
        return plus(sum_dv, y_cv)

    def turn(i, sum_dv):
        at = i * PIECE_COLUMNS
        old, y = (jax.lax.dynamic_slice_in_dim(a, at, PIECE_COLUMNS, axis=1) for a in (sum_dv, y_cv))
        return jax.lax.dynamic_update_slice_in_dim(sum_dv, plus(old, y), at, axis=1)

    sum_dv = jax.lax.fori_loop(0, pieces, turn, sum_dv)
    if (at := pieces * PIECE_COLUMNS) < columns:
        sum_dv = sum_dv.at[:, at:].set(plus(sum_dv[:, at:], y_cv[:, at:]))
    return sum_dv


def _gathered(layout: Layout | None, w_dv):
    if layout is None or not layout.embed:
        return w_dv
    return jax.lax.all_gather(w_dv, layout.embed, axis=0, tiled=True)


def _summed(layout: Layout | None, dx, dw, x_td, w_dv):
    """Gradients summed over the devices that hold a part of each sum, in the dtypes of their arrays."""
    if layout is not None and layout.vocab:
        dx = jax.lax.psum(dx, layout.vocab)
    if dw is not None and layout is not None:
        if layout.embed:
            dw = jax.lax.psum_scatter(dw, layout.embed, scatter_dimension=0, tiled=True)
        rest = tuple(axis for axis in layout.tokens if axis not in layout.embed)
        dw = jax.lax.psum(dw, rest) if rest else dw
    return dx.astype(x_td.dtype), dw if dw is None else dw.astype(w_dv.dtype)
