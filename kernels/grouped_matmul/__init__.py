"""Products of rows with the matrix of their group: the public function, its checks, the choice of a backend."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from maxstack.kernels import Unsupported
from maxstack.kernels.dispatch import chip, choose, only_on
from maxstack.kernels.grouped_matmul import native, reference
from maxstack.kernels.grouped_matmul.derivative import BACKENDS, product
from maxstack.kernels.grouped_matmul.quantized import part
from maxstack.kernels.quantized_matmul.weight import QuantizedWeight
from maxstack.kernels.sharded import explicit_mesh, varying, varying_over

NAME = "grouped_matmul"
Implementation = Literal["auto", "mosaic_tpu", "mosaic_gpu", "cpu_native", "xla", "reference"]


def grouped_matmul(
    x_td: Float[Array, "t d"],
    w_mdf: Float[Array, "m d f"] | QuantizedWeight,
    group_sizes_e: Int[Array, "e"],
    *,
    first: Int[Array, ""] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "t f"]:
    """Row `i` of `x_td` times the matrix of its group: the experts of a mixture, with no row dropped.

    Rows are sorted by group: the first `group_sizes_e[0]` belong to group 0, the next `group_sizes_e[1]` to group 1
    and so on. Rows past the sum of the sizes belong to none: they give 0, get and give no gradient, whatever finite
    numbers they hold. A sum beyond `t` is cut off at `t`. Sizes are data (≥ 0), never shapes: another routing
    compiles nothing anew.

    Products are summed in float32 (float64 for float64) and returned in the dtype of `x_td`; so are gradients, each
    in its array's dtype. Differentiable in reverse mode. Weights of 8 or 4 bits are a QuantizedWeight of [e, f, d],
    one matrix [outputs, inputs] a group; they are frozen, and the gradient is that of `x_td`.

    There are as many matrices as groups. Or more, a stack of many layers': group 0 then has that of number `first`, and
    so on (a number past the last that fits is that one). The kernel for TPUs reads a stack where it lies, that for
    Hopper one of few bits; elsewhere the matrices are cut out. They are frozen: TypeError for who asks for their
    gradient.

    Works on local arrays: on a mesh with explicit axes call it inside `jax.shard_map`. Raises ValueError for shapes
    that disagree, TypeError for dtypes, Unsupported for arrays on such a mesh and when the named implementation
    cannot serve the call.
    """
    _check(x_td, w_mdf, group_sizes_e, first)
    backends = declined(x_td, w_mdf, group_sizes_e)
    taken = choose(NAME, implementation, backends, named_only=("reference",))
    if first is not None:
        w_mdf, first = _of_stack(taken, x_td, w_mdf, first, group_sizes_e.shape[0])
    if taken == "reference":
        return reference.grouped_matmul(x_td, w_mdf, group_sizes_e)
    # Inside `jax.shard_map` all vary over the same mesh axes: loops and kernels want it, and a shared matrix's gradient
    # is then summed over the devices by the transpose of this cast, outside of the custom derivative.
    arrays = (x_td, w_mdf, group_sizes_e, first)
    x_td, w_mdf, group_sizes_e, first = varying_over(
        frozenset().union(*map(varying, jax.tree.leaves(arrays))), arrays
    )
    if x_td.shape[0] == 0:
        outputs = w_mdf.outputs if isinstance(w_mdf, QuantizedWeight) else w_mdf.shape[2]
        return varying_over(varying(x_td), jnp.zeros((0, outputs), x_td.dtype))
    return product(taken, x_td, w_mdf, group_sizes_e, first)


def _of_stack(
    taken: str, x_td: Array, w: Array | QuantizedWeight, first: Array, groups: int
) -> tuple[Array | QuantizedWeight, Array | None]:
    """The weight as the backend `taken` takes it, and where the groups begin in it; None: it is cut out."""
    w = w if isinstance(w, QuantizedWeight) else _frozen(w)
    first = jnp.clip(first, 0, w.shape[0] - groups)
    if taken == "mosaic_tpu" or (taken == "mosaic_gpu" and BACKENDS[taken].in_place(x_td, w, groups)):
        return w, first
    return part(w, first, groups), None


@jax.custom_vjp
def _frozen(w: Array) -> Array:
    return w


def _refused(w: Array) -> tuple[Array, None]:
    raise TypeError(
        f"grouped_matmul: w {w.shape} is a stack, in which `first` says where groups begin, and has no gradient; cut "
        "the groups' matrices out of it and leave `first` out"
    )


_frozen.defvjp(_refused, lambda _, dw: (dw,))


def declined(x_td: Array, w: Array | QuantizedWeight, group_sizes_e: Array) -> dict[str, str | None]:
    """The backends, best first, each with why it cannot serve this call."""
    return {
        "mosaic_tpu": only_on("tpu") or BACKENDS["mosaic_tpu"].declined(x_td, w, group_sizes_e),
        "mosaic_gpu": only_on("gpu") or hopper() or BACKENDS["mosaic_gpu"].declined(x_td, w),
        "cpu_native": only_on("cpu") or native.declined(x_td, w, group_sizes_e),
        "xla": None,
        "reference": None,
    }


def hopper() -> str | None:
    """Why the Hopper kernels cannot run here."""
    here = chip().name
    return None if here.startswith("sm90") else f"it is written for Hopper (sm90), and this is {here}"


def _check(
    x_td: jax.Array, w_edf: jax.Array | QuantizedWeight, group_sizes_e: jax.Array, first: jax.Array | None
) -> None:
    quantized = isinstance(w_edf, QuantizedWeight)
    if quantized:
        _check_quantized(w_edf)
    for name, array, ndim in (
        ("x [t, d]", x_td, 2),
        ("w [e, d, f]", w_edf.values if quantized else w_edf, 3),
        ("sizes [e]", group_sizes_e, 1),
    ):
        if array.ndim != ndim:
            raise ValueError(f"grouped_matmul: {name} must have {ndim} dimensions, not {array.shape}")
    inputs = w_edf.inputs if quantized else w_edf.shape[1]
    if x_td.shape[1] != inputs:
        raise ValueError(f"grouped_matmul: x has width {x_td.shape[1]}, w {w_edf.shape} takes {inputs}")
    groups, matrices = group_sizes_e.shape[0], w_edf.shape[0]
    if first is None and groups != matrices:
        raise ValueError(
            f"grouped_matmul: {groups} group sizes and {matrices} matrices; they must agree, or `first` say where in a "
            "stack the groups begin"
        )
    if first is not None:
        _check_first(first, groups, matrices)
    if not jnp.issubdtype(x_td.dtype, jnp.floating):
        raise TypeError(f"grouped_matmul: x must be floating-point, not {x_td.dtype}")
    if quantized and x_td.dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(f"grouped_matmul: x must be bfloat16 or float32 for packed weights, not {x_td.dtype}")
    if not quantized and x_td.dtype != w_edf.dtype:
        raise TypeError(
            f"grouped_matmul: x is {x_td.dtype} and w {w_edf.dtype}; cast one of them where it is seen"
        )
    if not jnp.issubdtype(group_sizes_e.dtype, jnp.integer):
        raise TypeError(f"grouped_matmul: group sizes must be integers, not {group_sizes_e.dtype}")
    leaves = jax.tree.leaves((x_td, w_edf, group_sizes_e, first))
    if explicit_mesh(*leaves) is not None:
        cut = ", ".join(str(jax.typeof(a)) for a in leaves)
        raise Unsupported(
            f"grouped_matmul: {cut} lie on a mesh; call it inside jax.shard_map, on local arrays"
        )


def _check_first(first: jax.Array, groups: int, matrices: int) -> None:
    if matrices < groups:
        raise ValueError(
            f"grouped_matmul: {groups} group sizes and a stack of {matrices} matrices; it must hold one for each group"
        )
    if jnp.ndim(first) or not jnp.issubdtype(jnp.result_type(first), jnp.integer):
        raise TypeError(
            f"grouped_matmul: first must be one integer, not {jnp.result_type(first)} {jnp.shape(first)}"
        )


def _check_quantized(w: QuantizedWeight) -> None:
    groups = -(-w.inputs // w.group)
    for name, array in (("scale", w.scale), ("zero", w.zero)):
        if array is not None and array.shape != (*w.shape[:-2], groups, w.outputs):
            raise ValueError(
                f"grouped_matmul: {name} has shape {array.shape}; {w.inputs} inputs in groups of {w.group} and "
                f"{w.outputs} outputs want {(*w.shape[:-2], groups, w.outputs)}"
            )
    width = -(-w.inputs // 2) if w.values.dtype == jnp.uint8 else w.inputs
    if w.values.dtype not in (jnp.int8, jnp.int4, jnp.uint8) or w.values.shape[-1] != width:
        raise ValueError(
            f"grouped_matmul: values are {w.values.dtype} {w.values.shape}; {w.inputs} inputs are int8 or int4 "
            f"[e, f, {w.inputs}], or uint8 [e, f, {-(-w.inputs // 2)}]"
        )
