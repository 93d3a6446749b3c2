"""Grouped products against float64 numpy: values, gradients, what is refused, and how they lie on a mesh."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxstack.kernels import Unsupported
from maxstack.kernels.grouped_matmul import blocked, grouped_matmul, ragged

D, F = 5, 7
# Float32 against float64: a few roundings of sums of tens of terms of size 1.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@st.composite
def routings(draw) -> tuple[int, list[int]]:
    """(rows, group sizes): few shapes, to compile little; empty groups, one group for all, rows left over."""
    rows = draw(st.sampled_from([1, 8, 41]))
    groups = draw(st.sampled_from([1, 3, 6]))
    ends = sorted(draw(st.lists(st.integers(0, rows), min_size=groups, max_size=groups)))
    return rows, np.diff([0, *ends]).tolist()


EDGES = [
    (41, [41, 0, 0, 0, 0, 0]),
    (41, [0, 0, 0, 0, 0, 41]),
    (41, [0, 0, 0, 0, 0, 0]),
    (41, [7, 0, 8, 9, 0, 16]),
    (300, [130, 0, 128]),  # more rows than the largest block
]


def drawn(rows: int, groups: int, seed: int = 0):
    """x, w and the result's cotangent, float64."""
    random = np.random.default_rng(seed)
    return tuple(random.normal(size=shape) for shape in ((rows, D), (groups, D, F), (rows, F)))


def by_loop(x, w, sizes, dy):
    """(y, dx, dw), one row at a time."""
    y, dx, dw = np.zeros((len(x), F)), np.zeros_like(x), np.zeros_like(w)
    group_of_row = [group for group, size in enumerate(sizes) for _ in range(size)][: len(x)]
    for row, group in enumerate(group_of_row):
        y[row] = x[row] @ w[group]
        dx[row] = w[group] @ dy[row]
        dw[group] += np.outer(x[row], dy[row])
    return y, dx, dw


@jax.jit(static_argnames="implementation")
def ours(x, w, sizes, dy, implementation="auto"):
    """(y, dx, dw)."""
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
    return y, *pull(dy)


def as_jax(x, w, sizes, dy, dtype=jnp.float32):
    return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(sizes, jnp.int32), jnp.asarray(dy, dtype)


def assert_equal_to_loop(found, x, w, sizes, dy):
    for one, other in zip(found, by_loop(x, w, sizes, dy), strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@settings(max_examples=25, deadline=None)
@given(routing=routings(), seed=st.integers(0, 99))
def test_values_and_gradients_equal_a_loop_over_rows(implementation, routing, seed):
    rows, sizes = routing
    x, w, dy = drawn(rows, len(sizes), seed)
    assert_equal_to_loop(ours(*as_jax(x, w, sizes, dy), implementation), x, w, sizes, dy)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(("rows", "sizes"), EDGES, ids=str)
def test_borders_between_groups_and_blocks_are_where_the_sizes_say(implementation, rows, sizes):
    x, w, dy = drawn(rows, len(sizes))
    assert_equal_to_loop(ours(*as_jax(x, w, sizes, dy), implementation), x, w, sizes, dy)


@jax.jit(static_argnames="implementation")
def of_stack(x, w, sizes, first, dy, implementation):
    """(y, dx)."""
    y, pull = jax.vjp(lambda x: grouped_matmul(x, w, sizes, first=first, implementation=implementation), x)
    return y, *pull(dy)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_groups_of_a_stack_have_the_matrices_from_the_first_on(implementation):
    sizes = [7, 0, 8, 9, 0, 16]
    x, w, dy = drawn(41, 3 * len(sizes))
    arrays = as_jax(x, w, sizes, dy)
    for first in (0, 6, 12, 99):  # of the last layer; beyond it there is none
        y, dx = of_stack(*arrays[:3], jnp.int32(first), arrays[3], implementation)
        at = min(first, 12)
        meant = by_loop(x, w[at : at + 6], sizes, dy)
        np.testing.assert_allclose(y, meant[0], **CLOSE)
        np.testing.assert_allclose(dx, meant[1], **CLOSE)


def test_the_gradient_by_a_stack_is_refused():
    x, w, dy = drawn(8, 6)
    x, w, sizes, _ = as_jax(x, w, [3, 0, 5], dy)
    loss = lambda w: jnp.sum(grouped_matmul(x, w, sizes, first=jnp.int32(3)))  # noqa: E731
    with pytest.raises(TypeError, match=r"w \(6, 5, 7\) is a stack.*leave `first` out"):
        jax.grad(loss)(w)


@pytest.mark.parametrize(("rows", "sizes"), EDGES, ids=str)
def test_the_form_for_the_cpu_equals_the_form_for_other_platforms(rows, sizes):
    x, w, dy = drawn(rows, len(sizes))
    x, w, sizes, dy = as_jax(x, w, sizes, dy)
    for transposed, left in ((False, x), (True, dy)):
        one, other = (form.rows(left, w, sizes, transposed) for form in (blocked, ragged))
        np.testing.assert_allclose(one, other, **CLOSE)
    one, other = (form.matrices(x, dy, sizes) for form in (blocked, ragged))
    np.testing.assert_allclose(one, other, **CLOSE)


def test_gradients_equal_finite_differences():
    x, w, dy = drawn(41, 3)
    sizes, step = [7, 0, 30], 1e-6
    _, dx, dw = ours(*as_jax(x, w, sizes, dy))
    for which, at in ((0, (6, 2)), (0, (7, 2)), (0, (36, 0)), (0, (37, 0)), (1, (0, 4, 6)), (1, (2, 0, 3))):
        values = []
        for sign in (1, -1):
            moved = x.copy(), w.copy()
            moved[which][at] += sign * step
            values.append(np.sum(dy * by_loop(moved[0], moved[1], sizes, dy)[0]))
        slope = (values[0] - values[1]) / (2 * step)
        np.testing.assert_allclose((dx, dw)[which][at], slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_rows_of_no_group_give_zero_and_no_gradient_on_the_cpu_even_when_they_hold_nan(implementation):
    x, w, dy = drawn(41, 3)
    sizes = [9, 0, 20]
    wanted = by_loop(x, w, sizes, dy)
    x[29:], dy[29:] = np.nan, np.nan
    y, dx, dw = ours(*as_jax(x, w, sizes, dy), implementation)
    assert not np.asarray(y[29:]).any()
    assert not np.asarray(dx[29:]).any()
    for one, other in zip((y, dx, dw), wanted, strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_sizes_past_the_last_row_are_cut_off(implementation):
    x, w, dy = drawn(8, 3)
    assert_equal_to_loop(ours(*as_jax(x, w, [5, 6, 4], dy), implementation), x, w, [5, 3, 0], dy)


def test_no_rows_give_no_rows_and_a_gradient_of_zero():
    x, w, dy = drawn(0, 3)
    y, dx, dw = ours(*as_jax(x, w, [0, 0, 0], dy))
    assert y.shape == (0, F)
    assert dx.shape == (0, D)
    assert not np.asarray(dw).any()


def test_the_order_of_rows_within_a_group_and_of_groups_changes_nothing():
    x, w, dy = drawn(41, 3)
    y, dx, dw = ours(*as_jax(x, w, [7, 14, 20], dy))
    random = np.random.default_rng(1)
    group_rows = [random.permutation(np.arange(a, b)) for a, b in ((0, 7), (7, 21), (21, 41))]
    groups = [2, 0, 1]
    order = np.concatenate([group_rows[g] for g in groups])
    moved = ours(*as_jax(x[order], w[groups], [20, 7, 14], dy[order]))
    for one, other in zip(moved, (y[order], dx[order], dw[jnp.asarray(groups)]), strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


def test_bfloat16_is_rounded_once():
    # Products of bfloat16 are exact in float32 and summed there; what is left is the rounding of the result to 8
    # bits, at most 2^-8 of it, and float32 roundings of sums. Gradients of w pass over several blocks of rows.
    sizes = [1000, 0, 500]
    x, w, dy = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in drawn(1600, 3))
    for one, other in zip(
        ours(*as_jax(x, w, sizes, dy, jnp.bfloat16)), by_loop(x, w, sizes, dy), strict=True
    ):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=2**-8, atol=1e-4)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x, w, dy = drawn(41, 3)
        sizes = [7, 0, 30]
        found = ours(*as_jax(x, w, sizes, dy, jnp.float64))
        for one, other in zip(found, by_loop(x, w, sizes, dy), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-13)


def test_scanned_and_rematerialised_layers_have_the_gradients_of_a_loop():
    random = np.random.default_rng(2)
    w_ledd = jnp.asarray(0.5 * random.normal(size=(3, 4, D, D)), jnp.float32)
    x = jnp.asarray(random.normal(size=(41, D)), jnp.float32)
    sizes = jnp.asarray([10, 0, 17, 14], jnp.int32)

    def layer(x, w):
        return jnp.sin(grouped_matmul(x, w, sizes)), None

    def scanned(w_ledd):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, w_ledd)[0])

    def looped(w_ledd):
        y = x
        for w in w_ledd:
            y = jnp.sin(grouped_matmul(y, w, sizes, implementation="reference"))
        return jnp.sum(y)

    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(w_ledd), jax.grad(looped)(w_ledd), **CLOSE)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map_each_device_serves_its_rows_and_the_gradient_of_w_is_summed(check_vma):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    sizes = np.random.default_rng(3).multinomial(9, [0.5, 0.0, 0.3, 0.2], size=8)[
        :, :3
    ]  # some rows left over
    x, w, dy = drawn(8 * 9, 3)
    mesh = jax.make_mesh((8,), ("data",))
    cut, whole = jax.P("data"), jax.P()
    with jax.set_mesh(mesh):
        arrays = as_jax(x, w, sizes.reshape(-1), dy)
        placed = [
            jax.device_put(a, jax.NamedSharding(mesh, p))
            for a, p in zip(arrays, (cut, whole, cut, cut), strict=True)
        ]

        def loss(x, w, sizes, dy):
            local = jax.shard_map(
                grouped_matmul, in_specs=(cut, whole, cut), out_specs=cut, check_vma=check_vma
            )
            return jnp.sum(local(x, w, sizes) * dy)

        dx, dw = jax.jit(jax.grad(loss, (0, 1)))(*placed)
    wanted = [by_loop(x[9 * i : 9 * i + 9], w, sizes[i], dy[9 * i : 9 * i + 9]) for i in range(8)]
    np.testing.assert_allclose(jax.device_get(dx), np.concatenate([one[1] for one in wanted]), **CLOSE)
    np.testing.assert_allclose(jax.device_get(dw), sum(one[2] for one in wanted), **CLOSE)


@pytest.mark.usefixtures("optimized")
def test_no_array_of_all_rows_for_all_groups_is_made_on_the_cpu():
    t, d, e = 1024, 64, 32
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((t, d), (e, d, d), (t, d))]
    sizes = jax.ShapeDtypeStruct((e,), jnp.int32)
    program = ours.lower(shapes[0], shapes[1], sizes, shapes[2]).compile()
    assert (
        program.memory_analysis().temp_size_in_bytes < 2 * 4 * t * d
    )  # one array of [e, t, d] takes 16 times that


def test_the_platform_compiled_for_chooses_the_form():
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((41, D), (3, D, F), (41, F))]
    traced = ours.trace(shapes[0], shapes[1], jax.ShapeDtypeStruct((3,), jnp.int32), shapes[2])
    for platform, is_ragged in (("cpu", False), ("tpu", True)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert (text.count("chlo.ragged_dot") >= 3) == is_ragged, platform
        assert ("stablehlo.while" in text) != is_ragged, platform


@pytest.fixture
def no_shape_checks():
    """Shape annotations are checked in tests only; a user meets the function's own words."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


REFUSED = {
    "width": ((8, 4), (3, 5, 7), (3,), ValueError, r"width 4.*\(3, 5, 7\) takes 5"),
    "groups": ((8, 5), (3, 5, 7), (4,), ValueError, "4 group sizes and 3 matrices"),
    "rank of x": ((2, 8, 5), (3, 5, 7), (3,), ValueError, r"2 dimensions, not \(2, 8, 5\)"),
    "rank of w": ((8, 5), (5, 7), (3,), ValueError, r"3 dimensions, not \(5, 7\)"),
    "rank of sizes": ((8, 5), (3, 5, 7), (3, 1), ValueError, r"1 dimensions, not \(3, 1\)"),
}


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("name", REFUSED)
def test_shapes_that_disagree_are_refused_with_the_numbers(name):
    x, w, sizes, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        grouped_matmul(jnp.ones(x), jnp.ones(w), jnp.ones(sizes, jnp.int32))


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("matrices", "first", "error", "words"),
    [
        (3, jnp.int32(0), ValueError, "4 group sizes and a stack of 3 matrices"),
        (8, jnp.float32(4), TypeError, "first must be one integer, not float32"),
        (8, jnp.zeros(1, jnp.int32), TypeError, r"first must be one integer, not int32 \(1,\)"),
    ],
)
def test_a_stack_that_does_not_fit_is_refused_with_the_numbers(matrices, first, error, words):
    with pytest.raises(error, match=words):
        grouped_matmul(jnp.ones((8, 5)), jnp.ones((matrices, 5, 7)), jnp.ones(4, jnp.int32), first=first)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize(
    ("dtypes", "words"),
    [
        (("float32", "bfloat16", "int32"), "x is float32 and w bfloat16"),
        (("int32", "int32", "int32"), "floating-point, not int32"),
        (("float32", "float32", "float32"), "integers, not float32"),
    ],
)
def test_dtypes_that_do_not_fit_are_refused_by_name(dtypes, words):
    shapes = ((8, 5), (3, 5, 7), (3,))
    with pytest.raises(TypeError, match=words):
        grouped_matmul(*(jnp.ones(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)))


@pytest.mark.parametrize(
    ("implementation", "words"),
    [
        ("mosaic_gpu", "needs a GPU, and this is a cpu"),
        ("mosaic_tpu", "needs a TPU, and this is a cpu"),
        ("cpu_native", "reads weights of 8 or 4 bits"),
    ],
)
def test_a_named_backend_that_cannot_serve_says_why(implementation, words):
    with pytest.raises(Unsupported, match=words):
        grouped_matmul(jnp.ones((8, D)), jnp.ones((1, D, F)), jnp.asarray([8]), implementation=implementation)


@pytest.mark.usefixtures("no_shape_checks")
def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'triton'; known: auto, mosaic_tpu, mosaic_gpu, cpu_native, xla"):
        grouped_matmul(jnp.ones((8, D)), jnp.ones((1, D, F)), jnp.asarray([8]), implementation="triton")


def test_arrays_on_a_mesh_outside_of_shard_map_are_refused():
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    x = jax.device_put(jnp.ones((jax.device_count(), D)), jax.NamedSharding(mesh, jax.P("data")))
    w, sizes = jnp.ones((1, D, F)), jnp.asarray([1], jnp.int32)
    with pytest.raises(Unsupported, match="call it inside jax"):
        grouped_matmul(x, w, sizes)
