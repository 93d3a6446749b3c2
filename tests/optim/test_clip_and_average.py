"""Global norm, clipping by it, and the average of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.optim import clip_by_norm, ema_update, global_norm

GRADS = {"b": jnp.asarray([3.0, 0.0]), "a": jnp.asarray([[4.0], [12.0]])}


def test_norm_is_over_all_leaves():
    assert float(global_norm(GRADS)) == 13.0


def test_norm_of_bfloat16_gradients_is_summed_in_float32():
    grads = {"a": jnp.full(10_000, 0.01, jnp.bfloat16)}
    # A bfloat16 sum of 1e-4 stops growing near 0.03; 0.01 is stored as 0.010009766.
    assert float(global_norm(grads)) == pytest.approx(1.0009766, rel=1e-5)


def test_norm_tells_of_a_single_bad_entry():
    for bad in (jnp.nan, jnp.inf):
        assert not jnp.isfinite(global_norm(GRADS | {"c": jnp.asarray([0.0, bad])}))


def test_clipping_scales_all_leaves_to_the_limit_by_the_norm_of_before():
    clipped = clip_by_norm(GRADS, global_norm(GRADS), 6.5)
    np.testing.assert_allclose(clipped["a"], [[2.0], [6.0]], rtol=1e-6)
    assert float(global_norm(clipped)) == pytest.approx(6.5, rel=1e-6)


@pytest.mark.parametrize("limit", [13.0, 100.0, 0.0])
def test_clipping_changes_no_bit_below_the_limit_and_is_off_at_zero(limit):
    random = {"a": jax.random.normal(jax.random.key(0), (64,))}
    norm = jnp.minimum(global_norm(random), 13.0)
    np.testing.assert_array_equal(clip_by_norm(random, norm, limit)["a"], random["a"])


def test_clipping_keeps_the_type_of_the_gradients():
    grads = {"a": jnp.ones(4, jnp.bfloat16)}
    assert clip_by_norm(grads, global_norm(grads), 0.5)["a"].dtype == jnp.bfloat16


def test_average_without_warmup_is_the_weighted_sum():
    ema, want = {"w": jnp.asarray([1.0])}, 1.0
    for step in range(20):
        ema = ema_update(ema, {"w": jnp.asarray([float(step)])}, 0.9, step, warmup=False)
        want = 0.9 * want + 0.1 * step
    assert float(ema["w"][0]) == pytest.approx(want, rel=1e-5)  # 20 roundings of 6e-8


def test_warmup_forgets_the_random_start_and_reaches_the_decay():
    ema = {"w": jnp.asarray([1.0])}
    for step in range(10):
        ema = ema_update(ema, {"w": jnp.zeros(1)}, 0.9999, step)
    assert 0 < float(ema["w"][0]) < 2e-5
    late = ema_update({"w": jnp.ones(1)}, {"w": jnp.zeros(1)}, 0.9, 1000)
    assert float(late["w"][0]) == pytest.approx(0.9, rel=1e-6)


def test_average_of_equal_weights_does_not_drift():
    params = {"w": jax.random.normal(jax.random.key(1), (100,))}
    ema = dict(params)
    for step in range(50):
        ema = ema_update(ema, params, 0.999, step)
    np.testing.assert_array_equal(ema["w"], params["w"])


def test_average_is_kept_in_float32_for_bfloat16_weights():
    ema = ema_update({"w": jnp.ones(2)}, {"w": jnp.zeros(2, jnp.bfloat16)}, 0.999, 10_000)
    assert ema["w"].dtype == jnp.float32
    assert float(ema["w"][0]) == pytest.approx(0.999, rel=1e-6)


def test_impossible_decay_is_refused():
    with pytest.raises(ValueError, match=r"at least 0 and below 1, got 1\.5"):
        ema_update({}, {}, 1.5, 0)
