"""Weights of 8 and 4 bits in panels, for C++ on a CPU, against float64 numpy: values, any shape, any company."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxstack.kernels import cpu_native
from maxstack.kernels.quantized_matmul import (
    PanelWeight,
    from_panels,
    in_panels,
    panel_matmul,
    quantize,
    stored,
)
from tests.kernels.test_quantized_matmul import ALL, CLOSE, by_hand, drawn, example

pytestmark = pytest.mark.skipif(not cpu_native.available(), reason=f"no C++: {cpu_native.problem()}")
product = jax.jit(panel_matmul)


@functools.cache
def laid_out(n: int, k: int, kind: str, zeros: bool) -> tuple[PanelWeight, np.ndarray]:
    w = example(n, k, kind, zeros)[1]
    return in_panels(w), by_hand(w)


def agrees(w: PanelWeight, full_nk: np.ndarray, tokens: int) -> bool:
    x = drawn(tokens, w.inputs, seed=1)
    meant = x.astype(np.float64) @ full_nk.T
    found = np.asarray(product(jnp.asarray(x), w), np.float64)
    assert found.shape == meant.shape
    return bool(np.abs(found - meant).max(initial=0) <= CLOSE * np.abs(meant).max(initial=1e-30))


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([0, 1, 2, 3, 5, 7, 12, 13, 40, 130]), st.sampled_from([1, 16, 37, 90]),
    st.sampled_from([1, 7, 31, 65, 257, 600]), st.sampled_from(ALL),
)  # fmt: skip
def test_products_equal_float64_for_any_shape(tokens, n, k, kind_zeros):
    assert agrees(*laid_out(n, k, *kind_zeros), tokens)


@pytest.mark.parametrize(("kind", "zeros"), ALL)
def test_a_row_has_the_same_product_in_any_company(kind, zeros):
    w, _ = laid_out(90, 600, kind, zeros)
    # Tiny ones too: x is divided by powers of two, whose last bits numbers below the least normal one lose.
    x = drawn(205, 600) * np.float32(10.0) ** np.random.default_rng(2).integers(-38, 3, (205, 600))
    wanted = np.asarray(product(jnp.asarray(x, jnp.float32), w))
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 14, 32, 97):
        np.testing.assert_array_equal(product(jnp.asarray(x[-rows:], jnp.float32), w), wanted[-rows:])


@pytest.mark.parametrize(("kind", "zeros"), ALL)
def test_the_panels_hold_the_matrix(kind, zeros):
    w, full_nk = laid_out(37, 257, kind, zeros)
    np.testing.assert_allclose(from_panels(w), full_nk, rtol=1e-6)
    assert w.values.nbytes == 48 * (257 if kind == "int8" else 4 * 33)


def test_int4_kept_as_such_is_laid_out_alike():
    w = example(37, 257, "int4-g32", True)[1]
    np.testing.assert_array_equal(in_panels(stored(w, "int4")).values, in_panels(w).values)


@pytest.mark.parametrize("sizes", [[3, 0, 1, 20, 2], [0, 0, 0, 0, 40], [4, 30, 0, 0, 0], [0, 0, 0, 0, 0]])
@pytest.mark.parametrize("kind", ["int8", "int4-g32"])
def test_rows_get_the_matrix_of_their_group_and_the_bits_of_any_other_company(kind, sizes):
    own = [in_panels(quantize(jnp.asarray(drawn(37, 257, seed=group)), kind)) for group in range(5)]
    x = jnp.asarray(drawn(34, 257, seed=1))
    y = product(x, jax.tree.map(lambda *a: np.stack(a), *own), jnp.asarray(sizes, jnp.int32))
    start = 0
    for w, size in zip(own, sizes, strict=True):
        np.testing.assert_array_equal(y[start : start + size], product(x, w)[start : start + size])
        start += size
    assert not np.asarray(y[start:]).any()


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("kind", ["int8", "int4-g32", "int4-g128"])
def test_the_comparison_sees_what_could_be_wrong(kind, tokens):
    """Planted in the weight: two scales changed places, one value of one input, the last group left out."""
    w, full_nk = laid_out(37, 257, kind, False)
    scale = np.asarray(w.scale).copy()
    scale[..., :2] = scale[..., 1::-1]
    values = np.asarray(w.values).copy()
    values[1, 20, 3] ^= 0x40  # an eighth of what an input can be, and one nibble of eight
    tail = np.asarray(w.values).copy()
    tail[:, 256 if kind == "int8" else 32] = 0 if kind == "int8" else 0x88888888
    assert agrees(w, full_nk, tokens)
    for wrong in ({"scale": scale}, {"values": values}, {"values": tail}):
        assert not agrees(dataclasses.replace(w, **wrong), full_nk, tokens), wrong.keys()


def test_a_weight_that_is_not_finite_shows():
    w = in_panels(quantize(jnp.asarray(drawn(4, 64)).at[2, 5].set(jnp.inf), "int4-g32"))
    y = np.asarray(product(jnp.ones((3, 64)), w))
    assert np.isfinite(y[:, [0, 1, 3]]).all()
    assert not np.isfinite(y[:, 2]).any()
