"""Products with a weight on one device: flattened to two dimensions, with a float32 weight gradient.

Left to itself XLA:CPU converts both operands of a bfloat16 weight gradient to float32, at a third of the speed. Here
one operand is laid out transposed first, the form that it multiplies fastest; elsewhere the plain product is best.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

Pair = tuple[Array, Array]


def product(x: Float[Array, "b t ..."], w: Float[Array, "..."], contract: int) -> Float[Array, "b t ..."]:
    """`x w` in x's type: the last `contract` axes of x with the first of w, which stays float32 outside."""
    inputs, outputs = math.prod(w.shape[:contract]), w.shape[contract:]
    y = flat_product(x.reshape(-1, inputs), w.reshape(inputs, -1))
    return y.reshape(*x.shape[:2], *outputs)


def dot(a: Array, b: Array, axes: tuple[int, int], dtype: jnp.dtype) -> Array:
    """Product of two matrices over one axis of each, summed in float32."""
    wide = jnp.promote_types(dtype, jnp.float32)
    contracting = ((axes[:1], axes[1:]), ((), ()))
    return jax.lax.dot_general(a, b, contracting, preferred_element_type=wide).astype(dtype)


@jax.custom_vjp
def flat_product(x: Float[Array, "t d"], w: Float[Array, "d f"]) -> Float[Array, "t f"]:
    """`x w` with w cast to x's type; its gradient comes in w's own type, summed in float32."""
    return dot(x, w.astype(x.dtype), (1, 0), x.dtype)


def forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    """The product, named for rematerialisation, and what its gradients need."""
    return checkpoint_name(flat_product(x, w), "product"), (x, w)


def backward(kept: Pair, g: Array) -> Pair:
    """Gradients of both operands."""
    x, w = kept
    dx = dot(g, w.astype(x.dtype), (1, 1), x.dtype)
    dw = jax.lax.platform_dependent(
        x, g, cpu=partial(transposed_first, w.dtype), default=partial(as_it_is, w.dtype)
    )
    return dx, dw


def transposed_first(dtype: jnp.dtype, x: Array, g: Array) -> Array:
    """x^T g, x laid out transposed in memory first. The barrier keeps what made x from being computed column-wise."""
    if x.dtype != jnp.bfloat16:
        return as_it_is(dtype, x, g)
    x, g = jax.lax.optimization_barrier((x, g))
    return dot(with_layout_constraint(x.T, Layout((0, 1))), g, (1, 0), dtype)


def as_it_is(dtype: jnp.dtype, x: Array, g: Array) -> Array:
    """x^T g."""
    return dot(x, g, (0, 0), dtype)


flat_product.defvjp(forward, backward)
