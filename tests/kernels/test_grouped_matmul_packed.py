"""Grouped products with weights of 8 and 4 bits against float64 numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxstack.kernels import Unsupported, cpu_native
from maxstack.kernels.dispatch import Chip, compiling_for
from maxstack.kernels.grouped_matmul import declined, grouped_matmul, ragged
from maxstack.kernels.quantized_matmul import KINDS, QuantizedWeight, quantize
from tests.kernels.test_quantized_matmul import by_hand

HERE = ["xla", "reference", *(["cpu_native"] if cpu_native.available() else [])]
OUTPUTS, GROUPS = 6, 5
# Sums of hundreds of terms in float32, of the largest result.
CLOSE = 5e-6
pack = jax.jit(lambda w, kind: jax.vmap(functools.partial(quantize, kind=kind))(w), static_argnames=("kind",))
product = jax.jit(grouped_matmul, static_argnames=("implementation",))


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def example(kind: str, inputs: int) -> tuple[QuantizedWeight, np.ndarray]:
    """A weight, and its matrices [e, n, k] by hand."""
    w = pack(jnp.asarray(drawn(GROUPS, OUTPUTS, inputs)), kind)
    return w, np.stack([by_hand(jax.tree.map(lambda a, e=e: a[e], w)) for e in range(GROUPS)])


def by_loop(x: np.ndarray, w_enk: np.ndarray, sizes: list[int]) -> np.ndarray:
    y = np.zeros((len(x), w_enk.shape[1]))
    for row, group in enumerate(np.repeat(np.arange(len(sizes)), sizes)[: len(x)]):
        y[row] = w_enk[group] @ x[row]
    return y


def assert_close(found, meant) -> None:
    np.testing.assert_allclose(
        np.asarray(found, np.float64), meant, rtol=0, atol=CLOSE * np.abs(meant).max(initial=1e-9)
    )


@st.composite
def routings(draw) -> tuple[int, list[int]]:
    """(rows, group sizes) with empty groups, rows left over, and sizes past the last row."""
    sizes = draw(st.lists(st.one_of(st.just(0), st.integers(0, 12)), min_size=GROUPS, max_size=GROUPS))
    return draw(st.sampled_from([1, 7, 24])), sizes


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize(
    ("kind", "inputs"), [("int8", 7), ("int8", 128), ("int4-g32", 40), ("int4-g32", 256), ("int4-g128", 200)]
)
@settings(max_examples=12, deadline=None)
@given(routing=routings())
def test_rows_get_the_matrix_of_their_group(implementation, kind, inputs, routing):
    rows, sizes = routing
    w, by_input = example(kind, inputs)
    x = drawn(rows, inputs, seed=1)
    y = product(jnp.asarray(x), w, jnp.asarray(sizes), implementation=implementation)
    assert_close(y, by_loop(x, by_input, sizes))


@pytest.mark.parametrize("implementation", HERE)
def test_the_gradient_is_that_of_the_rows_and_the_weight_is_frozen(implementation):
    w, by_input = example("int4-g32", 40)
    x, dy, sizes = jnp.asarray(drawn(24, 40)), drawn(24, OUTPUTS, seed=2), [9, 0, 1, 0, 10]
    loss = lambda x: jnp.sum(grouped_matmul(x, w, jnp.asarray(sizes), implementation=implementation) * dy)  # noqa: E731
    assert_close(jax.jit(jax.grad(loss))(x), by_loop(dy, by_input.swapaxes(1, 2), sizes))


@pytest.mark.parametrize("implementation", HERE)
def test_groups_of_a_stack_have_the_matrices_and_scales_from_the_first_on(implementation):
    w, by_input = example("int4-g32", 40)
    x, dy, sizes = drawn(7, 40), drawn(7, OUTPUTS, seed=2), jnp.asarray([3, 0, 2])

    @jax.jit
    def both(x, w, first):
        y, pull = jax.vjp(
            lambda x: grouped_matmul(x, w, sizes, first=first, implementation=implementation), x
        )
        return y, *pull(jnp.asarray(dy))

    for first in (0, 2):
        y, dx = both(jnp.asarray(x), w, jnp.int32(first))
        assert_close(y, by_loop(x, by_input[first:], [3, 0, 2]))
        assert_close(dx, by_loop(dy, by_input[first:].swapaxes(1, 2), [3, 0, 2]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_form_for_other_platforms_equals_a_loop(kind):
    w, by_input = example(kind, 256)
    x, dy, sizes = drawn(24, 256), drawn(24, OUTPUTS), [9, 0, 1, 0, 10]
    for left, transposed in ((x, False), (dy, True)):
        y = jax.jit(ragged.rows, static_argnums=3)(jnp.asarray(left), w, jnp.asarray(sizes), transposed)
        assert_close(y, by_loop(left, by_input.swapaxes(1, 2) if transposed else by_input, sizes))


def test_bfloat16_rows_come_back_in_bfloat16():
    w, by_input = example("int8", 128)
    x = jnp.asarray(drawn(7, 128), jnp.bfloat16)
    y = product(x, w, jnp.asarray([3, 0, 0, 4, 0]))
    assert y.dtype == jnp.bfloat16
    meant = by_loop(np.asarray(x, np.float64), by_input, [3, 0, 0, 4, 0])
    np.testing.assert_allclose(np.asarray(y, np.float64), meant, rtol=2**-8, atol=1e-4)


@pytest.mark.skipif(not cpu_native.available(), reason="needs the C++ part")
def test_few_rows_are_multiplied_by_the_cpp_part_and_many_by_xla():
    w, _ = example("int4-g32", 256)

    def program(rows: int) -> str:
        shapes = jax.ShapeDtypeStruct((rows, 256), jnp.float32), w, jax.ShapeDtypeStruct((GROUPS,), jnp.int32)
        return jax.jit(lambda *a: grouped_matmul(*a)).lower(*shapes).as_text()

    assert "grouped_int4_product" in program(16)
    assert "grouped_int4_product" not in program(16 * GROUPS + 1)


def test_chips_take_int4_that_is_kept_as_int4():
    w, _ = example("int4-g128", 256)
    x, sizes = jnp.ones((8, 256), jnp.bfloat16), jnp.zeros(GROUPS, int)
    with compiling_for(Chip("tpu", "v5e")):
        reasons = declined(x, w, sizes)
        assert "keep the weight as int4" in str(reasons["mosaic_tpu"])
        assert "needs a GPU" in str(reasons["mosaic_gpu"])
    with compiling_for(Chip("gpu", "sm80")):
        assert "written for Hopper" in str(declined(x, w, sizes)["mosaic_gpu"])
        with pytest.raises(Unsupported, match=r"sm90.*sm80"):
            grouped_matmul(x, w, sizes, implementation="mosaic_gpu")


def test_arrays_that_do_not_fit_are_refused_with_the_numbers():
    w, _ = example("int4-g32", 40)
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=r"width 41.*\(5, 6, 40\) takes 40"):
            grouped_matmul(jnp.ones((3, 41)), w, jnp.zeros(GROUPS, int))
        one = jax.tree.map(lambda a: a[0], w)
        with pytest.raises(ValueError, match=r"3 dimensions, not \(6, 20\)"):
            grouped_matmul(jnp.ones((3, 40)), one, jnp.zeros(GROUPS, int))
        with pytest.raises(ValueError, match=r"scale has shape \(5, 1, 6\).*want \(5, 2, 6\)"):
            grouped_matmul(
                jnp.ones((3, 40)), dataclasses.replace(w, scale=w.scale[:, :1]), jnp.zeros(GROUPS, int)
            )
        with pytest.raises(TypeError, match="bfloat16 or float32 for packed weights, not float16"):
            grouped_matmul(jnp.ones((3, 40), jnp.float16), w, jnp.zeros(GROUPS, int))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
