"""Optional C++ for decoding on a CPU, through XLA's foreign function interface. Everything works without it.

`available()` compiles it on first use where there is a compiler, and says whether it is there; `problem()` why not.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float32, Int, Int8, Int32, Shaped, UInt8, UInt32

from maxstack.kernels.cpu_native.build import PREFIX, problem

__all__ = [
    "MOST_ROWS", "PANEL", "VALUES_A_WORD", "attention", "attention_backward", "available", "cached_attention",
    "grouped_int4_product", "grouped_int8_product", "int4_panel_product", "int4_product", "int8_product",
    "paged_attention", "panel_product", "panel_product_at", "problem", "rms_norm", "row_exponentials", "row_sums",
    "untouched", "write_rows",
]  # fmt: skip

MOST_ROWS = 16
"""Rows up to which products with packed weights are the faster form: beyond, arithmetic and not memory decides."""


def available() -> bool:
    """Whether these operations can be called."""
    return problem() is None


PANEL = 16
"""Outputs of a panel."""
VALUES_A_WORD = 8
"""Of 4 bits, in a word of 32."""


def panel_product(
    x_tk: Float32[Array, "t k"],
    w_pko: Float32[Array, "*e p k 16"] | BFloat16[Array, "*e p k 16"] | Int8[Array, "*e p k 16"],
    scale_n: Float32[Array, "*e n"] | None = None,
    sizes_e: Int32[Array, "e"] | None = None,
) -> Float32[Array, "t n"]:
    """`x w` for any number of rows, with w's outputs in panels, each output times its scale. A row's result does not
    depend on how many there are: each output is summed over k in order.

    With sizes each row, sorted by group, meets the matrix of its group; rows of no group give 0.
    """
    out = jax.ShapeDtypeStruct((x_tk.shape[0], w_pko.shape[-3] * PANEL), jnp.float32)
    scale, sizes = or_none(scale_n, jnp.float32), or_none(sizes_e, jnp.int32)
    return jax.ffi.ffi_call(PREFIX + "panel_product", out)(x_tk, w_pko, scale, sizes)


def or_none(array: Shaped[Array, "..."] | None, dtype: Any) -> Shaped[Array, "..."]:
    """As C++ takes what may be left out: a number for none. An empty array would be moved out of `jax.shard_map` where
    a loop is differentiated, as it is the same in each turn, and come back cut over the mesh; and an empty array that
    is cut ends the process in XLA's partitioner (jaxlib 0.11.2)."""
    return jnp.zeros((), dtype) if array is None else array.astype(dtype)


def int4_panel_product(
    x_tk: Float32[Array, "t k"], words_pco: UInt32[Array, "*e p c 16"], scale_pgo: BFloat16[Array, "*e p g 16"],
    zero_pgo: BFloat16[Array, "*e p g 16"] | None, sizes_e: Int32[Array, "e"] | None = None, *, group: int,
) -> Float32[Array, "t n"]:  # fmt: skip
    """The same with eight values of 4 bits a word, each kept as itself plus 8, and scales for groups of 32 or 128
    inputs; a zero point is kept as `(8 + zero) / 8`."""
    rows, words = x_tk.shape[0], words_pco.shape[-2]
    out = jax.ShapeDtypeStruct((rows, words_pco.shape[-3] * PANEL), jnp.float32)
    laid = jax.ShapeDtypeStruct((rows, words * VALUES_A_WORD + scale_pgo.shape[-2]), jnp.float32)
    zero, sizes = or_none(zero_pgo, jnp.bfloat16), or_none(sizes_e, jnp.int32)
    call = jax.ffi.ffi_call(PREFIX + "int4_panel_product", (out, laid))
    return call(x_tk, words_pco, scale_pgo, zero, sizes, group=np.int64(group))[0]


def panel_product_at(
    x_tk: Float32[Array, "t k"], w_lpko: Float32[Array, "l p k 16"] | BFloat16[Array, "l p k 16"],
    at: Int32[Array, ""],
) -> Float32[Array, "t n"]:  # fmt: skip
    """`panel_product` with one of several matrices. A loop that cuts it out of them would copy it."""
    out = jax.ShapeDtypeStruct((x_tk.shape[0], w_lpko.shape[1] * PANEL), jnp.float32)
    return jax.ffi.ffi_call(PREFIX + "panel_product_at", out)(x_tk, w_lpko, at)


def rms_norm(
    x_td: Float32[Array, "t d"], scale_d: Float32[Array, "d"], *, eps: float, offset: float
) -> Float32[Array, "t d"]:
    """Each row over its root mean square, times `scale + offset`; like products, the same in any company."""
    out = jax.ShapeDtypeStruct(x_td.shape, jnp.float32)
    call = jax.ffi.ffi_call(PREFIX + "rms_norm", out)
    return call(x_td, scale_d, eps=np.float32(eps), offset=np.float32(offset))


def row_exponentials(
    x_tn: Float32[Array, "t n"],
) -> tuple[Float32[Array, "t n"], Float32[Array, "t"], Float32[Array, "t"]]:
    """`e^(x - largest)` of each row, the sums of those, and the log-sum-exp of each row; the same in any company."""
    row = jax.ShapeDtypeStruct(x_tn.shape[:1], jnp.float32)
    whole = jax.ShapeDtypeStruct(x_tn.shape, jnp.float32)
    exponentials, totals, lse = jax.ffi.ffi_call(PREFIX + "row_exponentials", (whole, row, row))(x_tn)
    return exponentials, totals, lse


def row_sums(x: Float32[Array, "... n"]) -> Float32[Array, "..."]:
    """Sums over the last axis; each the same in any company."""
    rows = x.reshape(-1, x.shape[-1])
    out = jax.ShapeDtypeStruct(rows.shape[:1], jnp.float32)
    return jax.ffi.ffi_call(PREFIX + "row_sums", out)(rows).reshape(x.shape[:-1])


def int8_product(
    x_tk: Float32[Array, "t k"], w_nk: Int8[Array, "n k"], scale_1n: Float32[Array, "1 n"]
) -> Float32[Array, "t n"]:
    """`x (scale w)^T` for few rows."""
    out = jax.ShapeDtypeStruct((x_tk.shape[0], w_nk.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(PREFIX + "int8_product", out)(x_tk, w_nk, scale_1n)


def int4_product(
    x_tk: Float32[Array, "t k"], w_nj: UInt8[Array, "n j"], scale_gn: BFloat16[Array, "g n"],
    zero_gn: BFloat16[Array, "g n"] | None, *, group: int,
) -> Float32[Array, "t n"]:  # fmt: skip
    """`x (scale (w - zero))^T` for few rows, with two values a byte (the even input in the low half), and scales and
    zero points for groups of 32 or 128 inputs."""
    out = jax.ShapeDtypeStruct((x_tk.shape[0], w_nj.shape[0]), jnp.float32)
    zero = or_none(zero_gn, jnp.bfloat16)
    return jax.ffi.ffi_call(PREFIX + "int4_product", out)(x_tk, w_nj, scale_gn, zero, group=np.int64(group))


def grouped_int8_product(
    x_tk: Float32[Array, "t k"], w_enk: Int8[Array, "e n k"], scale_e1n: Float32[Array, "e 1 n"],
    sizes_e: Int32[Array, "e"],
) -> Float32[Array, "t n"]:  # fmt: skip
    """Each of few rows, sorted by group, times the matrix of its group; rows of no group give 0."""
    out = jax.ShapeDtypeStruct((x_tk.shape[0], w_enk.shape[1]), jnp.float32)
    return jax.ffi.ffi_call(PREFIX + "grouped_int8_product", out)(x_tk, w_enk, scale_e1n, sizes_e)


def grouped_int4_product(
    x_tk: Float32[Array, "t k"], w_enj: UInt8[Array, "e n j"], scale_egn: BFloat16[Array, "e g n"],
    sizes_e: Int32[Array, "e"], *, group: int,
) -> Float32[Array, "t n"]:  # fmt: skip
    """The same with two values a byte, and scales for groups of 32 or 128 inputs."""
    out = jax.ShapeDtypeStruct((x_tk.shape[0], w_enj.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call(PREFIX + "grouped_int4_product", out)
    return call(x_tk, w_enj, scale_egn, sizes_e, group=np.int64(group))


def cached_attention(
    q_bkgh: Float[Array, "b k g h"], k_bk1h: Float[Array, "b k 1 h"], v_bk1w: Float[Array, "b k 1 w"],
    cached_k_bksh: Float[Array, "b k s h"], cached_v_bksw: Float[Array, "b k s w"], lengths_b: Int[Array, "b"],
    sinks_kg: Float[Array, "k g"] | None, *, scale: float, softcap: float | None, window: int | None,
) -> Float[Array, "b k g w"]:  # fmt: skip
    """One new token a row against the filled slots of its cache and itself; float32. Reads no slot that is hidden."""
    b, k, g, _ = q_bkgh.shape
    sinks = jnp.full((k, g), -jnp.inf, jnp.float32) if sinks_kg is None else sinks_kg
    out = jax.ShapeDtypeStruct((b, k, g, v_bk1w.shape[-1]), jnp.float32)
    call = jax.ffi.ffi_call(PREFIX + "cached_attention", out)
    return call(
        q_bkgh, k_bk1h, v_bk1w, cached_k_bksh, cached_v_bksw, lengths_b, sinks,
        scale=np.float32(scale), softcap=np.float32(softcap or 0.0), window=np.int64(window or 0),
    )  # fmt: skip


def attention(
    q_btnh: Float[Array, "b t n h"], k_bskh: Float[Array, "b s k h"], v_bskw: Float[Array, "b s k w"],
    ids: Sequence[Int[Array, "b _"] | None], *, causal: bool, scale: float, softcap: float | None, window: int | None,
) -> tuple[Float[Array, "b t n w"], Float32[Array, "b t n"]]:  # fmt: skip
    """Output and log-sum-exp of the logits, of float32 or bfloat16. `ids`: segments of queries and of keys, without
    which there is one document, and positions of both, else indices."""
    b, t, n, _ = q_btnh.shape
    out = (
        jax.ShapeDtypeStruct((b, t, n, v_bskw.shape[-1]), q_btnh.dtype),
        jax.ShapeDtypeStruct((b, t, n), jnp.float32),
    )
    call = jax.ffi.ffi_call(PREFIX + "attention", out, vmap_method="sequential")
    given = (or_none(each, jnp.int32) for each in ids)
    attributes = mask_attributes(causal, scale, softcap, window)
    y_btnw, lse_btn = call(q_btnh, k_bskh, v_bskw, *given, **attributes)
    return y_btnw, lse_btn


def attention_backward(
    q_btnh: Float[Array, "b t n h"], k_bskh: Float[Array, "b s k h"], v_bskw: Float[Array, "b s k w"],
    ids: Sequence[Int[Array, "b _"] | None], dout_btnw: Float[Array, "b t n w"], lse_btn: Float32[Array, "b t n"],
    delta_btn: Float32[Array, "b t n"], *, causal: bool, scale: float, softcap: float | None, window: int | None,
) -> tuple[Float[Array, "b t n h"], Float[Array, "b s k h"], Float[Array, "b s k w"]]:  # fmt: skip
    """Gradients of q, k and v. `lse` is inf for a query that saw nothing; `delta` is Σ dout·out less the cotangent of
    lse."""
    out = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q_btnh, k_bskh, v_bskw)]
    call = jax.ffi.ffi_call(PREFIX + "attention_backward", out, vmap_method="sequential")
    dq, dk, dv = call(
        q_btnh, k_bskh, v_bskw, *(or_none(each, jnp.int32) for each in ids), dout_btnw, lse_btn, delta_btn,
        **mask_attributes(causal, scale, softcap, window),
    )  # fmt: skip
    return dq, dk, dv


def mask_attributes(causal: bool, scale: float, softcap: float | None, window: int | None) -> dict[str, Any]:
    """As C++ takes them: 0 for none."""
    return {
        "causal": bool(causal), "scale": np.float32(scale), "softcap": np.float32(softcap or 0.0),
        "window": np.int64(window or 0),
    }  # fmt: skip


def paged_attention(
    q_btnh: Float32[Array, "b t n h"], k_pages: Shaped[Array, "P k page j"], v_pages: Shaped[Array, "P k j page"],
    k_scale: Float32[Array, "P k page"] | None, v_scale: Float32[Array, "P k page"] | None,
    table_bp: Int32[Array, "b p"], lengths_b: Int32[Array, "b"], *, scale: float, softcap: float | None,
    window: int | None, splits: int,
) -> tuple[Float32[Array, "b t n h"], Float32[Array, "b t n"]]:  # fmt: skip
    """The last `t` positions of each sequence over its pages, and the log-sum-exp of their logits. `splits` 0: pieces
    that begin at the same positions whatever the length."""
    k_scale, v_scale = (or_none(scale, jnp.float32) for scale in (k_scale, v_scale))
    out = (
        jax.ShapeDtypeStruct(q_btnh.shape, jnp.float32),
        jax.ShapeDtypeStruct(q_btnh.shape[:3], jnp.float32),
    )
    y_btnh, lse_btn = jax.ffi.ffi_call(PREFIX + "paged_attention", out)(
        q_btnh, k_pages, v_pages, k_scale, v_scale, table_bp, lengths_b, scale=np.float32(scale),
        softcap=np.float32(softcap or 0.0), window=np.int64(window or 0), splits=np.int64(splits),
    )  # fmt: skip
    return y_btnh, lse_btn


def untouched(shapes: Sequence[jax.ShapeDtypeStruct]) -> list[Array]:
    """Arrays with anything in them, of memory that the system need not give before it is used."""
    return list(jax.ffi.ffi_call(PREFIX + "untouched", list(shapes))())


def write_rows(
    page_r: Int32[Array, "r"], place_r: Int32[Array, "r"], pools: Sequence[Array], rows: Sequence[Array],
    axes: Sequence[int],
) -> list[Array]:  # fmt: skip
    """Each pool [P, …, page, …] with `rows` [r, …] at places of pages; `axes` says where a pool counts places.

    In place where the pool may be overwritten: nothing is copied that is donated or not used again. Rows whose page is
    none of the pool are dropped.
    """
    out = [jax.ShapeDtypeStruct(pool.shape, pool.dtype) for pool in pools]
    aliases = {2 + i: i for i in range(len(pools))}
    call = jax.ffi.ffi_call(PREFIX + "write_rows", out, input_output_aliases=aliases)
    return list(call(page_r, place_r, *pools, *rows, axes=np.asarray(axes, np.int64)))
