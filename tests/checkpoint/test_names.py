"""Names are stable and readable, and lead back to the tree."""

import jax
import jax.numpy as jnp
import optax
import pytest

from maxstack.checkpoint import flatten, like, named, unflatten
from tests.checkpoint.states import OPTIMIZER, make_params


def test_optimizer_state_has_readable_names() -> None:
    names = flatten(named(OPTIMIZER.init(make_params())))
    # chain(clip, adamw): clipping has no state; adamw is itself a chain whose first part has the moments.
    assert set(names) == {
        "1/0/count",
        *(f"1/0/{moment}/{name}" for moment in ("mu", "nu") for name in make_params()),
    }


def test_like_is_the_inverse_of_named_for_masked_and_injected_states() -> None:
    params = make_params()
    mask = {name: leaf.ndim > 1 for name, leaf in params.items()}
    optimizer = optax.chain(
        optax.masked(optax.scale_by_lion(), mask), optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    )
    state = optimizer.init(params)
    back = like(jax.eval_shape(optimizer.init, params), unflatten(flatten(named(state))))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert all(x is y for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True))


def test_like_names_what_does_not_fit() -> None:
    adam, sgd = optax.adam(1e-3).init(make_params()), optax.sgd(1e-3, momentum=0.9).init(make_params())
    with pytest.raises(ValueError, match=r"missing \['0/count'.*unexpected \['0/trace"):
        like(adam, named(sgd))


def test_names_that_would_collide_are_refused() -> None:
    @jax.tree_util.register_pytree_with_keys_class
    class Twins:
        def tree_flatten_with_keys(self) -> tuple[list[tuple[object, object]], None]:
            return [(jax.tree_util.DictKey(key), jnp.ones(1)) for key in (0, "0")], None

        @classmethod
        def tree_unflatten(cls, _: None, children: object) -> "Twins":
            return cls()

    with pytest.raises(ValueError, match="two leaves of the tree have the name 'a/0'"):
        named({"a": Twins()})
    with pytest.raises(ValueError, match="'a/b' must be a name without '/'"):
        flatten({"a/b": jnp.ones(1)})
    with pytest.raises(ValueError, match="'a/b' must be a name without '/'"):
        named({"a/b": jnp.ones(1)})


def test_flatten_and_unflatten_keep_dotted_names() -> None:
    state = {"params": {"blocks.0.w": 1, "blocks": 2}, "step": 3}
    assert flatten(state) == {"params/blocks.0.w": 1, "params/blocks": 2, "step": 3}
    assert unflatten(flatten(state)) == state
