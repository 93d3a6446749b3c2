"""Optimizers on 8 devices under explicit sharding: same numbers, state sharded as its axes say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxstack.optim import (
    AdafactorConfig,
    OptimConfig,
    build,
    clip_by_norm,
    ema_update,
    global_norm,
    state_axes,
)

AXES = {
    "table": ("vocab", "embed"), "q": ("layers", "embed", "heads", "head_dim"),
    "q_bias": ("layers", "heads", "head_dim"), "o": ("layers", "heads", "head_dim", "embed"),
    "router": ("layers", "embed", "expert"), "experts": ("layers", "expert", "embed", "mlp"),
    "norm": ("layers", "norm"),
}  # fmt: skip
SIZES = {"vocab": 32, "embed": 16, "layers": 3, "heads": 4, "head_dim": 4, "norm": 16, "expert": 8, "mlp": 24}
RULES = {"vocab": "tensor", "embed": "fsdp", "heads": "tensor", "mlp": "tensor", "expert": "data"}
NAMES = ["adamw", "muon", "adafactor", "lion", "sgd"]


def spec(axes: tuple[str, ...]) -> jax.P:
    return jax.P(*[RULES.get(axis) for axis in axes])


def arrays(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        n: random.standard_normal([SIZES[a] for a in axes]).astype(np.float32) for n, axes in AXES.items()
    }


def three_steps(config: OptimConfig, params, grads):
    optimizer = build(config, 10, AXES)
    state, ema = optimizer.init(params), params
    for step in range(3):
        clipped = clip_by_norm(grads, global_norm(grads), config.clip_norm)
        updates, state = optimizer.update(clipped, state, params)
        params = optax.apply_updates(params, updates)
        ema = ema_update(ema, params, 0.9, step)
    return params, state, ema


@pytest.mark.parametrize("name", NAMES)
def test_three_steps_are_equal_on_one_and_eight_devices_and_states_sharded_by_their_axes(name):
    config = OptimConfig(name=name, adafactor=AdafactorConfig(relative=True, momentum=0.5))
    params, grads = arrays(0), arrays(1)
    one = jax.jit(lambda p, g: three_steps(config, p, g))(*jax.tree.map(jnp.asarray, (params, grads)))
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    where = {n: jax.NamedSharding(mesh, spec(axes)) for n, axes in AXES.items()}
    with jax.set_mesh(mesh):
        eight = jax.jit(lambda p, g: three_steps(config, p, g))(
            *jax.device_put((params, grads), (where, where))
        )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        # Sums in another order, on values of about 1: some units of 6e-8. Muon amplifies it, by at most 480.
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 if name == "muon" else 2e-6)
    state = eight[1]
    for leaf, axes in jax.tree.leaves(
        jax.tree.map(lambda leaf, axes: Pair(leaf, axes), state, state_axes(state, params, AXES))
    ):
        assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec(axes)), leaf.ndim), axes


class Pair(tuple):
    """A leaf with its axes, itself a leaf."""

    def __new__(cls, *items):
        return super().__new__(cls, items)


@pytest.mark.parametrize("name", NAMES)
def test_state_axes_name_every_dim_of_every_state(name):
    optimizer = build(OptimConfig(name=name), 10, AXES)
    params = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, arrays(0)))
    state = jax.eval_shape(optimizer.init, params)
    pairs = jax.tree.leaves(
        jax.tree.map(lambda leaf, axes: Pair(leaf, axes), state, state_axes(state, params, AXES))
    )
    for leaf, axes in pairs:
        assert leaf.shape == tuple(SIZES[axis] for axis in axes)


def test_adafactor_keeps_rows_and_columns_only():
    optimizer = build(OptimConfig(name="adafactor"), 10, AXES)
    params = jax.tree.map(jnp.asarray, arrays(0))
    state = optimizer.init(params)
    axes = state_axes(state, params, AXES).direction
    assert axes.row["o"] == ("layers", "heads", "head_dim")
    assert axes.col["o"] == ("layers", "embed")
    assert axes.row["experts"] == ("layers", "expert", "embed")
    assert axes.full["router"] == AXES["router"]
    weights = sum(leaf.size for leaf in params.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < weights / 5


def test_state_axes_refuse_a_state_of_other_weights():
    params = {"a": jnp.zeros((4, 6))}
    state = optax.scale_by_adam().init({"b": jnp.zeros((4, 6))})
    with pytest.raises(ValueError, match="belongs to no weight"):
        state_axes(state, params, {"a": ("embed", "mlp")})
    state = optax.scale_by_adam().init({"a": jnp.zeros((4, 5))})
    with pytest.raises(ValueError, match=r"shape \(4, 5\), its weight \(4, 6\)"):
        state_axes(state, params, {"a": ("embed", "mlp")})
