"""Rotary embedding: rotations, relative positions, partial rotation, the length scalings' limits."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.models import RopeConfig
from maxstack.models.rope import SCALINGS, document_lengths, plain_frequencies, rotate

THETA = RopeConfig(theta=100.0)


def positions(*values: int) -> jnp.ndarray:
    return jnp.asarray([values], jnp.int32)


def heads(size: int, length: int = 3) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(0).standard_normal((1, length, 2, size)), jnp.float32)


def test_pairs_turn_by_position_times_frequency():
    x = heads(8)
    turned = np.asarray(rotate(x, THETA.table(positions(0, 1, 7), 8)))
    pairs = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])  # pairs are (i, i + 4)
    angles = np.asarray([0, 1, 7])[:, None] * 100.0 ** -(np.arange(4) / 4)
    wanted = pairs * np.exp(1j * angles)[None, :, None, :]
    np.testing.assert_allclose(turned[..., :4] + 1j * turned[..., 4:], wanted, atol=2e-6)  # float32 of size 1


def test_products_depend_on_the_distance_alone():
    q, k = heads(8, 1), heads(8, 1)[..., ::-1]

    def product(q_at: int, k_at: int) -> float:
        q_, k_ = (rotate(x, THETA.table(positions(at), 8)) for x, at in ((q, q_at), (k, k_at)))
        return float(jnp.sum(q_ * k_))

    # Angles of 1000 radians have an error of 1000 * 2^-24 in float32; products of size 5.
    assert abs(product(5, 2) - product(1003, 1000)) < 1e-3
    assert abs(product(5, 2) - product(1004, 1000)) > 1e-2


def test_a_fraction_leaves_the_rest_of_each_head_alone():
    x = heads(8)
    half = dataclasses.replace(THETA, fraction=0.5)
    turned = rotate(x, half.table(positions(3, 4, 5), 8))
    assert np.array_equal(turned[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(turned[..., :4], rotate(x[..., :4], THETA.table(positions(3, 4, 5), 4)))


def test_tables_are_float32_and_exact_far_out():
    table = RopeConfig(theta=1e6).table(positions(0, 257, 100_003), 64)
    assert table.cos.dtype == table.sin.dtype == jnp.float32
    exact = np.asarray([0, 257, 100_003])[:, None] * 1e6 ** -(np.arange(32) / 32)
    # The float32 frequency is off by 2^-25 relative, the product again: 100003 * 2^-24 = 6e-3 of an angle.
    np.testing.assert_allclose(table.cos[0], np.cos(exact), atol=1e-2)
    np.testing.assert_allclose(table.cos[0, :2], np.cos(exact[:2]), atol=4e-5)


@pytest.mark.parametrize("scaling", ["linear", "yarn", "llama3"])
def test_a_factor_of_one_changes_no_frequency(scaling):
    config = RopeConfig(scaling=scaling, factor=1.0)
    np.testing.assert_allclose(SCALINGS[scaling](config, 64), plain_frequencies(config, 64), rtol=1e-12)
    assert config.gain() == 1.0


@pytest.mark.parametrize("scaling", ["yarn", "llama3"])
def test_fast_dimensions_are_kept_and_slow_ones_divided(scaling):
    config = RopeConfig(scaling=scaling, factor=8.0, theta=500_000.0)
    ratio = SCALINGS[scaling](config, 128) / plain_frequencies(config, 128)
    assert ratio[0] == 1.0
    np.testing.assert_allclose(ratio[-1], 1 / 8)
    assert (np.diff(ratio) <= 1e-12).all()  # and a ramp between


def test_dynamic_scaling_starts_past_the_original_context_and_goes_by_document():
    config = RopeConfig(theta=100.0, scaling="dynamic", factor=2.0, original_length=4)
    at = positions(0, 1, 2, 3, 0, 1, 2, 3, 4, 5)
    segments = jnp.asarray([[1] * 4 + [2] * 6], jnp.int32)
    lengths = document_lengths(at, segments)
    assert lengths.tolist() == [[4] * 4 + [6] * 6]
    assert document_lengths(at, None).tolist() == [[6]]
    table, plain = config.table(at, 8, lengths), THETA.table(at, 8)
    np.testing.assert_allclose(table.cos[:, :4], plain.cos[:, :4], atol=1e-6)
    base = 100.0 * (2 * 6 / 4 - 1) ** (8 / 6)
    np.testing.assert_allclose(table.cos[0, 9], np.cos(5 * base ** -(np.arange(4) / 4)), atol=1e-6)
