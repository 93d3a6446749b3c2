"""Products of rows with the matrix of their group: the public function, its checks, the choice of a backend."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxstack.kernels import Unsupported
from maxstack.kernels.dispatch import choose
from maxstack.kernels.grouped_matmul import reference, xla
from maxstack.kernels.sharded import explicit_mesh

Implementation = Literal["auto", "xla", "reference", "mosaic_gpu", "mosaic_tpu"]
_NOT_BUILT = "it is not built yet; 'xla' serves the call"
BACKENDS = {"xla": None, "reference": None, "mosaic_gpu": _NOT_BUILT, "mosaic_tpu": _NOT_BUILT}
NAMED_ONLY = ("reference", "mosaic_gpu", "mosaic_tpu")


def grouped_matmul(
    x_td: Float[Array, "t d"],
    w_edf: Float[Array, "e d f"],
    group_sizes_e: Int[Array, "e"],
    *,
    implementation: Implementation = "auto",
) -> Float[Array, "t f"]:
    """Row `i` of `x_td` times the matrix of its group: the experts of a mixture, with no row dropped.

    Rows are sorted by group: the first `group_sizes_e[0]` belong to group 0, the next `group_sizes_e[1]` to group 1
    and so on. Rows past the sum of the sizes belong to none: they give 0, get and give no gradient, whatever finite
    numbers they hold. A sum beyond `t` is cut off at `t`. Sizes are data (≥ 0), never shapes: another routing
    compiles nothing anew.

    Products are summed in float32 (float64 for float64) and returned in the dtype of `x_td`; so are gradients, each
    in its array's dtype. Differentiable in reverse mode. "xla", also the choice of "auto", takes the form that suits
    the platform it is compiled for: `xla` says which.

    Works on local arrays: on a mesh with explicit axes call it inside `jax.shard_map`. Raises ValueError for shapes
    that disagree, TypeError for dtypes, Unsupported for arrays on such a mesh and for backends that are not there.
    """
    taken = choose("grouped_matmul", implementation, BACKENDS, named_only=NAMED_ONLY)
    _check(x_td, w_edf, group_sizes_e)
    run = reference.grouped_matmul if taken == "reference" else xla.grouped_matmul
    return run(x_td, w_edf, group_sizes_e)


def _check(x_td: jax.Array, w_edf: jax.Array, group_sizes_e: jax.Array) -> None:
    for name, array, ndim in (
        ("x [t, d]", x_td, 2),
        ("w [e, d, f]", w_edf, 3),
        ("sizes [e]", group_sizes_e, 1),
    ):
        if array.ndim != ndim:
            raise ValueError(f"grouped_matmul: {name} must have {ndim} dimensions, not {array.shape}")
    if x_td.shape[1] != w_edf.shape[1]:
        raise ValueError(
            f"grouped_matmul: x has width {x_td.shape[1]}, w {w_edf.shape} takes {w_edf.shape[1]}"
        )
    if group_sizes_e.shape[0] != w_edf.shape[0]:
        raise ValueError(
            f"grouped_matmul: {group_sizes_e.shape[0]} group sizes and {w_edf.shape[0]} matrices; they must agree"
        )
    if not jnp.issubdtype(x_td.dtype, jnp.floating):
        raise TypeError(f"grouped_matmul: x must be floating-point, not {x_td.dtype}")
    if x_td.dtype != w_edf.dtype:
        raise TypeError(
            f"grouped_matmul: x is {x_td.dtype} and w {w_edf.dtype}; cast one of them where it is seen"
        )
    if not jnp.issubdtype(group_sizes_e.dtype, jnp.integer):
        raise TypeError(f"grouped_matmul: group sizes must be integers, not {group_sizes_e.dtype}")
    if explicit_mesh(x_td, w_edf, group_sizes_e) is not None:
        cut = ", ".join(str(jax.typeof(a)) for a in (x_td, w_edf, group_sizes_e))
        raise Unsupported(
            f"grouped_matmul: {cut} lie on a mesh; call it inside jax.shard_map, on local arrays"
        )
