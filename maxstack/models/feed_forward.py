"""Dense feed-forward layers: gated (SwiGLU, GeGLU) or plain."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from maxstack.models.layers import Linear, require

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu2"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}

# Per-layer results a block hands up besides its output: scalars to add to the loss, counts to balance by.
Aux = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """`down(activation(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202), or `down(activation(up(x)))`."""

    size: int
    """Inner width (columns of gate and up)."""
    activation: Activation = "silu"
    """silu makes SwiGLU, gelu GeGLU."""
    gated: bool = True
    """With a gate; without one, a plain two-layer perceptron."""
    bias: bool = False
    """Learned offsets."""

    def __post_init__(self):
        require("feed_forward", self, 1, "size")

    def build(self, key: jax.Array, width: int, residual_scale: float) -> "FeedForward":
        return FeedForward(self, key, width, residual_scale)


class FeedForward(nnx.Module):
    """`config` as a layer: [b, t, d] -> [b, t, d]."""

    def __init__(self, config: FeedForwardConfig, key: jax.Array, width: int, residual_scale: float):
        keys = jax.random.split(key, 3)
        f, bias = config.size, config.bias
        self.config = config
        self.gate = Linear(keys[0], (width, f), ("embed", "mlp"), bias=bias) if config.gated else None
        self.up = Linear(keys[1], (width, f), ("embed", "mlp"), bias=bias)
        self.down = Linear(keys[2], (f, width), ("mlp", "embed"), bias=bias, scale=residual_scale)

    def __call__(
        self, x: Float[Array, "b t d"], real_bt: Array | None = None
    ) -> tuple[Float[Array, "b t d"], Aux]:
        act, up = ACTIVATIONS[self.config.activation], self.up(x)
        h = act(up) if self.gate is None else act(self.gate(x)) * up
        return self.down(h), {}
