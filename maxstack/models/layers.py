"""The smallest parts: weights with logical axes, linear maps, norms, embeddings.

Initial values: a matrix is drawn from a normal truncated at two standard deviations with variance 1 / fan_in;
what writes into the residual stream is scaled by 1 / sqrt(2 * depth) besides, so that the stream's variance does
not grow with depth (Radford et al. 2019, section 2.3); embeddings have standard deviation 0.02; norms start at 1.
"""

import dataclasses
import math
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from maxstack import sharding
from maxstack.config import UserError
from maxstack.models.product import product

EMBEDDING_STD = 0.02
# Standard deviation of a standard normal truncated to [-2, 2]; divides it out.
TRUNCATED_STD = 0.8796256610342398


def require(where: str, config: Any, least: int, *fields: str) -> None:
    """Raise UserError for the first of a config's fields that is less than `least`."""
    for name in fields:
        if getattr(config, name) < least:
            raise UserError(f"{where}.{name} is {getattr(config, name)}: it must be at least {least}")


class Weight(nnx.Param):
    """A trained array. `axes` names its logical axes; a stacked copy has further leading axes ("layers")."""


class Buffer(nnx.Variable):
    """An array that is saved but not trained by gradients, such as a router's balancing bias."""


def weight(key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> Weight:
    """A float32 weight drawn from a truncated normal of standard deviation `std`."""
    values = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32) * (std / TRUNCATED_STD)
    return Weight(values, axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> Weight:
    """A float32 weight filled with `value`."""
    return Weight(jnp.full(shape, value, jnp.float32), axes=axes)


def operand(param: nnx.Variable, dtype: jnp.dtype) -> Array:
    """A weight ready for a product: in the compute type, gathered over `fsdp`."""
    return sharding.gather(param[...], param.get_metadata()["axes"], dtype)


class Linear(nnx.Module):
    """`y = x w + b`: contracts the last `contract` axes of x with the first axes of w.

    `axes` are the logical axes of w, inputs first; the outputs are sharded as activations of the same names.
    """

    def __init__(
        self, key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], *,
        contract: int = 1, bias: bool = False, scale: float = 1.0,
    ):  # fmt: skip
        self.contract = contract
        self.w = weight(key, shape, axes, scale / math.sqrt(math.prod(shape[:contract])))
        self.b = constant(0.0, shape[contract:], axes[contract:]) if bias else None
        self.axes = axes

    def __call__(self, x: Float[Array, "b t ..."]) -> Float[Array, "b t ..."]:
        y = product(x, self.w[...], self.axes, self.contract)
        if self.b is None:
            return y
        # Added in float32, and so its gradient is summed over all tokens in float32.
        return (y + operand(self.b, jnp.dtype(jnp.float32))).astype(y.dtype)

    def matrix(self, dtype: jnp.dtype) -> Float[Array, "..."]:
        """w in a type, whole, for products that are no `y = x w`."""
        return sharding.gather(self.w[...], self.axes, dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, unit_offset: bool, axis: str):
        self.scale = constant(0.0 if unit_offset else 1.0, (size,), (axis,))
        self.eps, self.offset = eps, float(unit_offset)

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        return (wide * inverse * (self.scale[...] + self.offset)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, in float32 (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, size: int, eps: float, bias: bool, axis: str):
        self.scale = constant(1.0, (size,), (axis,))
        self.bias = constant(0.0, (size,), (axis,)) if bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, -1, keepdims=True)
        wide = (
            wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps) * self.scale[...]
        )
        return (wide if self.bias is None else wide + self.bias[...]).astype(x.dtype)


class Identity(nnx.Module):
    """Stands where a block has no norm."""

    def __call__(self, x: Array) -> Array:
        return x


@runtime_checkable
class NormConfig(Protocol):
    """What a block needs of a norm's config: any frozen dataclass with this method will do."""

    def build(self, size: int, axis: str = "norm") -> nnx.Module: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSNormConfig:
    """Root-mean-square norm."""

    eps: float = 1e-6
    """Added to the mean square (dimensionless)."""
    unit_offset: bool = False
    """The stored scale is added to 1, as in Gemma."""

    def build(self, size: int, axis: str = "norm") -> RMSNorm:
        return RMSNorm(size, self.eps, self.unit_offset, axis)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNormConfig:
    """Layer norm."""

    eps: float = 1e-5
    """Added to the variance (dimensionless)."""
    bias: bool = True
    """Adds a learned offset."""

    def build(self, size: int, axis: str = "norm") -> LayerNorm:
        return LayerNorm(size, self.eps, self.bias, axis)


class Embedding(nnx.Module):
    """Token table [v, d]; rows are multiplied by `scale` on the way in."""

    def __init__(self, key: jax.Array, vocab_size: int, width: int, scale: float):
        self.table = weight(key, (vocab_size, width), ("vocab", "embed"), EMBEDDING_STD)
        self.scale = scale

    def __call__(self, tokens_bt: Int[Array, "b t"], dtype: jnp.dtype) -> Float[Array, "b t d"]:
        # Rows are cast, not the table: a frequent token's gradient is summed over its thousands of places in float32
        # (in bfloat16 the sum of ones ends at 256).
        x = sharding.rows(self.table[...], tokens_bt, dtype)
        return x if self.scale == 1.0 else x * jnp.asarray(self.scale, dtype)

    def unembedding(self, dtype: jnp.dtype) -> Float[Array, "d v"]:
        """The table as an output projection, cut as it is."""
        return self.table[...].astype(dtype).T


class Positions(nnx.Module):
    """A learned vector for each position of a document (tokens); positions past the last one have that one's."""

    def __init__(self, key: jax.Array, length: int, width: int):
        self.table = weight(key, (length, width), ("position", "embed"), EMBEDDING_STD)

    def __call__(self, positions_bt: Int[Array, "b t"], dtype: jnp.dtype) -> Float[Array, "b t d"]:
        last = self.table[...].shape[0] - 1
        return sharding.rows(self.table[...], jnp.minimum(positions_bt, last), dtype)


def soft_cap(x: Array, cap: float | None) -> Array:
    """`cap * tanh(x / cap)` in float32, or x when there is no cap (Gemma 2, arXiv:2408.00118, section 2)."""
    return x if cap is None else cap * jnp.tanh(x.astype(jnp.float32) / cap)
