"""Attention: the public function, its argument checks and the static choice of a backend."""

from typing import Any, Literal, overload

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxstack.kernels.attention import native, reference, xla
from maxstack.kernels.attention.layout import lay_out
from maxstack.kernels.attention.masks import Coordinates, Options
from maxstack.kernels.dispatch import Later, choose, elsewhere

Implementation = Literal["auto", "xla", "reference", "cpu_native", "mosaic_gpu", "mosaic_tpu"]
_BACKENDS: dict[str, Any] = {
    "mosaic_gpu": Later("maxstack.kernels.attention.mosaic_gpu"),
    "mosaic_tpu": Later("maxstack.kernels.attention.mosaic_tpu"),
    "cpu_native": native,
    "xla": xla,
}
"""Best first. Each has `declined(q, k, v, options, at, config) -> reason or None` and
`attention(options, config, layout, q, k, v, sinks, at) -> (out, lse)`, made by `derivative.differentiable`."""
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)
Ids = Int[Array, "b t"] | tuple[Int[Array, "b t"], Int[Array, "b s"]]


@overload
def attention(  # pyrefly: ignore [inconsistent-overload]
    q_btnh: Array, k_bskh: Array, v_bskw: Array, *, return_lse: Literal[False] = False, **options: Any
) -> Array: ...


@overload
def attention(  # pyrefly: ignore [inconsistent-overload]
    q_btnh: Array, k_bskh: Array, v_bskw: Array, *, return_lse: Literal[True], **options: Any
) -> tuple[Array, Array]: ...


def attention(
    q_btnh: Float[Array, "b t n h"],
    k_bskh: Float[Array, "b s k h"],
    v_bskw: Float[Array, "b s k w"],
    *,
    segment_ids: Ids | None = None,
    positions: Ids | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "n"] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
    config: Any = None,
) -> Float[Array, "b t n w"] | tuple[Float[Array, "b t n w"], Float[Array, "b t n"]]:
    """Softmax attention; `n // k` query heads share each kv head, without a repeated copy of it.

    A query sees a key iff they have the same segment and it is not 0 (padding), and, if `causal`,
    `kv_position <= q_position`, and, with a `window`, `q_position - kv_position < window`. Positions are indices
    unless given. For packed rows leave them out: within a segment indices have the same order, and are known
    early enough to skip blocks. `scale` is `h**-0.5` unless given; `softcap` c makes logits `c·tanh(logits/c)`;
    `sinks` are one more logit a head that takes weight and gives no value. `config` sizes the blocks of one backend
    (`blocks.Blocks` of "xla"), and others decline it. "auto" takes the best backend that can serve the call and logs
    once why others cannot; a backend that is named serves the call or raises.

    Returns the output in the dtype of the queries and, with `return_lse`, the log-sum-exp of the logits (sink
    included) in float32, differentiable too. A query that sees no key gets output 0, lse -inf (or its sink) and
    gives no gradient. Matrix products take the input dtype and sum in float32; float64 stays float64.

    On a mesh with explicit axes rows and heads may be cut; a cut sequence raises Unsupported. Raises ValueError
    for shapes that disagree, TypeError for dtypes, Unsupported for a backend that cannot serve the call.
    """
    _check(q_btnh, k_bskh, v_bskw, sinks, window, softcap)
    at = Coordinates(
        *_pair("segment_ids", segment_ids, q_btnh, k_bskh), *_pair("positions", positions, q_btnh, k_bskh)
    )
    scale = q_btnh.shape[-1] ** -0.5 if scale is None else scale
    options = Options(causal=causal, window=window, softcap=softcap, scale=scale)
    declined = {
        name: elsewhere(name) or backend.declined(q_btnh, k_bskh, v_bskw, options, at, config)
        for name, backend in _BACKENDS.items()
    }
    taken = choose("attention", implementation, declined | {"reference": None}, named_only=("reference",))
    if 0 in (*q_btnh.shape[:3], k_bskh.shape[1]):
        out, lse = _nothing(q_btnh, v_bskw, sinks)
    elif taken == "reference":
        out, lse = reference.attention(q_btnh, k_bskh, v_bskw, sinks, at, options)
    else:
        layout, k_bskh, v_bskw, sinks, at = lay_out(q_btnh, k_bskh, v_bskw, sinks, at)
        out, lse = _BACKENDS[taken].attention(options, config, layout, q_btnh, k_bskh, v_bskw, sinks, at)
    return (out, lse) if return_lse else out


def _nothing(q, v, sinks):
    """Output and log-sum-exp where there are no queries, or no keys for them to see."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    none = jnp.full(q.shape[:3], -jnp.inf, wide)
    lse = none if sinks is None else jnp.broadcast_to(sinks.astype(wide), none.shape)
    return jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype), lse


def _pair(name: str, ids: Ids | None, q, k):
    """(of the queries, of the keys); checked."""
    if ids is None:
        return None, None
    if not isinstance(ids, tuple):
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"attention: {q.shape[1]} queries and {k.shape[1]} keys need {name} as a pair (of queries, of keys)"
            )
        ids = (ids, ids)
    for part, rows, whose in zip(ids, (q, k), ("queries", "keys"), strict=True):
        if part.shape != rows.shape[:2]:
            raise ValueError(f"attention: {name} of the {whose} are {part.shape}, the {whose} {rows.shape}")
        if not jnp.issubdtype(part.dtype, jnp.integer):
            raise TypeError(f"attention: {name} must be integers, not {part.dtype}")
    return ids


def _check(q, k, v, sinks, window, softcap):
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise ValueError(f"attention: {name} must be [batch, position, heads, size], not {array.shape}")
        if array.dtype != q.dtype:
            raise TypeError(f"attention: q is {q.dtype} and {name} {array.dtype}; they must agree")
    if q.dtype not in _DTYPES:
        raise TypeError(f"attention: q, k and v must be bfloat16, float16, float32 or float64, not {q.dtype}")
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"attention: shapes disagree: q {q.shape}, k {k.shape}, v {v.shape}")
    if 0 in k.shape[2:]:
        raise ValueError(f"attention: k {k.shape} must have at least 1 head of at least 1 component")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: query heads {q.shape[2]} must be a multiple of kv heads {k.shape[2]}")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(
            f"attention: sinks {sinks.shape} must have one number for each of {q.shape[2]} query heads"
        )
    if window is not None and window < 1:
        raise ValueError(f"attention: window is {window} positions; it must be at least 1 (the query itself)")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"attention: softcap is {softcap}; it must be positive, or None for no cap")
