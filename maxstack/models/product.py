"""Products with a weight, whose gradient is summed in float32: over the tokens, and over the devices of a mesh.

On one device it is flattened to two dimensions. Left to itself XLA:CPU converts both operands of a bfloat16
weight gradient to float32, at a third of the speed. Here one operand is laid out transposed first, the form that it
multiplies fastest; elsewhere the plain product is best.

On a mesh the weight stays cut between its uses: it is gathered in the compute type for the
forward pass and again for the backward one, and its gradient is summed straight into the cut it has (a reduce-scatter
where the devices form a ring), so that a scan over layers never keeps a whole one.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from maxstack import sharding

Pair = tuple[Array, Array]


def product(
    x: Float[Array, "b t ..."], w: Float[Array, "..."], axes: tuple[str, ...], contract: int = 1
) -> Float[Array, "b t ..."]:
    """`x w` in x's type: the last `contract` axes of x with the first of w, which has the logical `axes`.

    w stays float32 and cut as it is outside; the output is sharded as an activation of its axes.
    """
    if not sharding.on_one_device():
        return sharded_product(x, w, axes, contract)
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


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def sharded_product(
    x: Float[Array, "b t ..."], w: Float[Array, "..."], axes: tuple[str, ...], contract: int
) -> Float[Array, "b t ..."]:
    """`product` on a mesh."""
    inner = tuple(range(contract))
    dims = ((tuple(2 + i for i in inner), inner), ((), ()))
    out = sharding.activation_spec("batch", "sequence", *axes[contract:])
    return jax.lax.dot_general(x, sharding.gather(w, axes, x.dtype), dims, out_sharding=out)


def sharded_forward(x: Array, w: Array, axes: tuple[str, ...], contract: int) -> tuple[Array, Pair]:
    """The product, named for rematerialisation, and what its gradients need: the weight as it is cut."""
    return checkpoint_name(sharded_product(x, w, axes, contract), "product"), (x, w)


def sharded_backward(axes: tuple[str, ...], contract: int, kept: Pair, g: Array) -> Pair:
    """Gradients of both operands, each as its operand is cut."""
    x, w = kept
    gathered, tokens = sharding.gather(w, axes, x.dtype), ((0, 1), (0, 1))
    outer = (tuple(range(2, g.ndim)), tuple(range(contract, w.ndim)))
    dx = jax.lax.dot_general(g, gathered, (outer, ((), ())), out_sharding=jax.typeof(x).sharding)
    wide = jnp.promote_types(w.dtype, jnp.float32)
    whole = sharding.unreduced(gathered, x)
    dw = jax.lax.dot_general(x, g, (tokens, ((), ())), preferred_element_type=wide, out_sharding=whole)
    return dx, jax.reshard(dw, jax.typeof(w).sharding).astype(w.dtype)


sharded_product.defvjp(sharded_forward, sharded_backward)
