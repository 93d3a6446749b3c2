"""Products with weights of 8 or 4 bits: the public function, its checks, its gradient, the choice of a backend."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from maxstack.kernels import Unsupported
from maxstack.kernels.dispatch import Later, chip, choose, only_on
from maxstack.kernels.quantized_matmul import native, reference, xla
from maxstack.kernels.quantized_matmul.layout import lay_out
from maxstack.kernels.quantized_matmul.panels import PanelWeight, from_panels, in_panels, panel_matmul
from maxstack.kernels.quantized_matmul.weight import (
    KINDS,
    Kind,
    QuantizedWeight,
    Storage,
    dequantize,
    quantize,
    stored,
)  # fmt: skip
from maxstack.kernels.sharded import varying, varying_over

__all__ = [
    "KINDS", "Activations", "Implementation", "Kind", "PanelWeight", "QuantizedWeight", "Storage", "dequantize",
    "from_panels", "in_panels", "panel_matmul", "quantize", "quantized_matmul", "stored",
]  # fmt: skip

Implementation = Literal["auto", "mosaic_tpu", "mosaic_gpu", "cpu_native", "xla", "reference"]
Activations = Literal["float", "int8"]
NAME = "quantized_matmul"
HOPPER = Later("maxstack.kernels.quantized_matmul.mosaic_gpu")
HOPPER_INT8 = Later("maxstack.kernels.quantized_matmul.mosaic_gpu_int8")
TPU = Later("maxstack.kernels.quantized_matmul.mosaic_tpu")


def quantized_matmul(
    x: Float[Array, "... k"], w: QuantizedWeight, *, implementation: Implementation = "auto",
    activations: Activations = "float", dtype: jnp.dtype | type | None = None,
) -> Float[Array, "... n"]:  # fmt: skip
    """`x w^T` with x [..., K] in bfloat16 or float32 and a weight of [N, K]: [..., N] in x's type, or in `dtype`.

    Products are summed in float32. With `activations` "int8" each token of x is rounded to int8 on the way in, and
    products of int8 are summed exactly: for weights of int8, where arithmetic and not memory is the limit.

    The gradient is that of x; a weight is frozen and gets none. On a mesh with explicit axes each device multiplies
    what it holds: the result is cut as x's tokens and the weight's outputs are, sums over inputs that are cut are added
    up, and the weight is gathered along axes that cut the tokens too. Of a stack of weights that of `w.layer` is meant:
    the kernels for TPUs and Hopper read it where it lies, others have it cut out. Raises ValueError for shapes that
    disagree, TypeError for types, Unsupported when the named implementation cannot serve the call.
    """
    check(x, w if w.layer is None else jax.eval_shape(QuantizedWeight.one, w), activations)
    w = w if chip().platform in ("tpu", "gpu") else w.one()
    layout, x, w = lay_out(x, w)
    dtype = jnp.dtype(dtype or x.dtype)
    if layout is None:
        return local_product(x, w, implementation, activations, dtype, ())

    def held(x: Array, w: QuantizedWeight) -> Array:
        # What is added up over devices is float32 until it is.
        own = jnp.dtype(jnp.float32) if layout.inputs else dtype
        y = local_product(x, layout.held(w), implementation, activations, own, layout.inputs)
        return jax.lax.psum(y, layout.inputs).astype(dtype) if layout.inputs else y

    return jax.shard_map(held, mesh=layout.mesh, in_specs=(layout.x, layout.weight(w)), out_specs=layout.y)(
        x, w
    )


def local_product(
    x: Array, w: QuantizedWeight, implementation: Implementation, activations: Activations, dtype: jnp.dtype,
    over: tuple[str, ...],
) -> Array:  # fmt: skip
    """The product of what one device holds, which are parts of sums `over` mesh axes."""
    x_tk = x.reshape(-1, w.inputs)
    backends = declined(x_tk, w, activations)
    if implementation == "auto" and activations == "float":
        backends["mosaic_gpu"] = backends["mosaic_gpu"] or HOPPER.worth(x_tk.shape[0])
    taken = choose(NAME, implementation, backends, named_only=("reference",))
    in_place = (taken == "mosaic_tpu" and w.zero is None) or (
        taken == "mosaic_gpu" and activations == "float"
    )
    w = w if in_place else w.one()
    # Inside `jax.shard_map`: where the weight is cut and x is whole, x's gradient is summed over the devices by the
    # transpose of this, outside of the custom derivative.
    axes = frozenset().union(*map(varying, (x_tk, *jax.tree.leaves(w))))
    x_tk, w = varying_over(axes, (x_tk, w))
    y_tn = product(taken, activations, dtype, over, x_tk, w)
    return y_tn.reshape(*x.shape[:-1], w.outputs)


def declined(x_tk: Array, w: QuantizedWeight, activations: Activations) -> dict[str, str | None]:
    """The backends, best first, each with why it cannot serve this call."""
    rounding = "it takes activations as they are" if activations == "int8" else None
    hopper_form = HOPPER_INT8 if activations == "int8" else HOPPER
    return {
        "mosaic_tpu": only_on("tpu") or int8_on(chip().name, activations) or TPU.declined(x_tk, w),
        "mosaic_gpu": only_on("gpu") or hopper() or hopper_form.declined(x_tk, w),
        "cpu_native": only_on("cpu") or rounding or native.declined(x_tk.shape[0], w),
        "xla": None,
        "reference": rounding,
    }


def hopper() -> str | None:
    """Why the Hopper kernel cannot run here."""
    here = chip().name
    return None if here.startswith("sm90") else f"it is written for Hopper (sm90), and this is {here}"


def int8_on(name: str, activations: Activations) -> str | None:
    """Why a TPU cannot multiply int8 with int8."""
    if activations == "int8" and name in TPU.WITHOUT_INT8:
        return f"{name} has no products of int8; leave activations float"
    return None


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def product(
    taken: str, activations: Activations, dtype: jnp.dtype, over: tuple[str, ...], x_tk: Array, w: QuantizedWeight
) -> Array:  # fmt: skip
    """The product by the backend `taken`. No token: nothing to do."""
    if x_tk.shape[0] == 0:
        return varying_over(varying(x_tk), jnp.zeros((0, w.outputs), dtype))
    if activations == "int8":
        q_tk, scale_t = xla.rounded_rows(x_tk, over)
        if taken == "mosaic_gpu":
            return HOPPER_INT8.int8_product(q_tk, scale_t, w, dtype)
        form = TPU.int8_product if taken == "mosaic_tpu" else xla.int8_product
        return form(q_tk, scale_t, w).astype(dtype)
    forms: dict[str, Any] = {
        "mosaic_tpu": TPU,
        "mosaic_gpu": HOPPER,
        "cpu_native": native,
        "xla": xla,
        "reference": reference,
    }
    own = {"dtype": dtype} if taken == "mosaic_tpu" else {}
    # What calls out of XLA does not say over which axes its result varies.
    return varying_over(varying(x_tk), forms[taken].quantized_matmul(x_tk, w, **own).astype(dtype))


def forward(
    taken: str,
    activations: Activations,
    dtype: jnp.dtype,
    over: tuple[str, ...],
    x_tk: Array,
    w: QuantizedWeight,
) -> tuple[Array, tuple[Array, QuantizedWeight]]:
    """The product, and what the gradient of x needs: of x its type alone."""
    return product(taken, activations, dtype, over, x_tk, w), (x_tk[:0], w)


def backward(
    taken: str, activations: Activations, dtype: jnp.dtype, over: tuple[str, ...],
    kept: tuple[Array, QuantizedWeight], dy_tn: Array,
) -> tuple[Array, None]:  # fmt: skip
    """The gradient of x, as if it had not been rounded; the weight is frozen."""
    typed, w = kept
    return xla.transposed(dy_tn.astype(typed.dtype), w.one()).astype(typed.dtype), None


product.defvjp(forward, backward)


def check(x: Array, w: QuantizedWeight, activations: str) -> None:
    """Raise for a call that no backend can serve."""
    if w.values.ndim != 2:
        raise ValueError(f"{NAME}: w must be one matrix [N, K], not {w.shape}: take it layer by layer")
    if x.ndim == 0 or x.shape[-1] != w.inputs:
        raise ValueError(f"{NAME}: x {x.shape} must end in the {w.inputs} inputs of w {w.shape}")
    groups = -(-w.inputs // w.group)
    for name, array in (("scale", w.scale), ("zero", w.zero)):
        if array is not None and array.shape != (groups, w.outputs):
            raise ValueError(
                f"{NAME}: {name} has shape {array.shape}; {w.inputs} inputs in groups of {w.group} and {w.outputs} "
                f"outputs want {(groups, w.outputs)}"
            )
    width = -(-w.inputs // 2) if w.values.dtype == jnp.uint8 else w.inputs
    if w.values.dtype not in (jnp.int8, jnp.int4, jnp.uint8) or w.values.shape[1] != width:
        raise ValueError(
            f"{NAME}: values are {w.values.dtype} {w.values.shape}; {w.inputs} inputs are int8 or int4 "
            f"[N, {w.inputs}], or uint8 [N, {-(-w.inputs // 2)}]"
        )
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(f"{NAME}: x must be bfloat16 or float32, not {x.dtype}")
    if activations not in ("float", "int8"):
        raise ValueError(f"{NAME}: activations {activations!r}; known: float, int8")
    if activations == "int8" and (w.bits != 8 or w.group != w.inputs):
        raise Unsupported(
            f"{NAME}: activations in int8 go with weights in int8, not in {w.bits} bits; leave them float"
        )
