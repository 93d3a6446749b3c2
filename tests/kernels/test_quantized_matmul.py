"""Products with weights of 8 and 4 bits against float64 numpy: rounding, values, gradients, what is refused."""

import functools
import re

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxstack.kernels import Unsupported, cpu_native
from maxstack.kernels.dispatch import Chip, compiling_for
from maxstack.kernels.quantized_matmul import (
    KINDS,
    QuantizedWeight,
    dequantize,
    quantize,
    quantized_matmul,
    stored,
    xla,
)  # fmt: skip

MOST = {"int8": 127, "int4-g32": 7, "int4-g128": 7}
# One program each, not one for every operation.
rounding = jax.jit(quantize, static_argnames=("kind", "zero_points", "storage"))
product = jax.jit(quantized_matmul, static_argnames=("implementation", "activations", "dtype"))
full = jax.jit(dequantize)
GROUP = {"int8": None, "int4-g32": 32, "int4-g128": 128}
ALL = [("int8", False), *((kind, zeros) for kind in KINDS[1:] for zeros in (False, True))]
HERE = ["xla", "reference", *(["cpu_native"] if cpu_native.available() else [])]
# Float32 sums of hundreds of terms against float64, of the largest result.
CLOSE = 5e-6


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def example(n: int, k: int, kind: str, zeros: bool) -> tuple[np.ndarray, QuantizedWeight]:
    w_nk = drawn(n, k) * np.linspace(0.1, 3, n, dtype=np.float32)[:, None] + (0.7 if zeros else 0)
    return w_nk, rounding(jnp.asarray(w_nk), kind, zero_points=zeros)


def by_hand(w: QuantizedWeight) -> np.ndarray:
    """Float64 weights from the bytes, input by input."""
    raw, k = np.asarray(w.values), w.inputs
    scale, zero = (None if a is None else np.asarray(a, np.float64) for a in (w.scale, w.zero))
    full = np.zeros((raw.shape[0], k))
    for i in range(k):
        if raw.dtype == np.uint8:
            four = (raw[:, i // 2].astype(int) >> (4 if i % 2 else 0)) & 15
            value = np.where(four > 7, four - 16, four)
        else:
            value = raw[:, i].astype(int)
        at = i // w.group
        full[:, i] = (value - (0 if zero is None else zero[at])) * scale[at]
    return full


@pytest.mark.parametrize(("kind", "zeros"), ALL)
@pytest.mark.parametrize(("n", "k"), [(3, 7), (5, 130), (6, 256)])
def test_a_weight_is_at_most_half_a_step_off(n, k, kind, zeros):
    w_nk, w = example(n, k, kind, zeros)
    found = by_hand(w)
    np.testing.assert_allclose(np.asarray(full(w)), found, rtol=1e-6)
    step = np.repeat(np.asarray(w.scale, np.float64).T, w.group, axis=1)[:, :k]
    assert (np.abs(found - w_nk) <= step * (0.5 + 1e-4)).all()
    if (
        not zeros
    ):  # the step is the smallest that reaches the largest weight, but for the rounding of the scale
        group = GROUP[kind] or k
        for start in range(0, k, group):
            most = np.abs(w_nk[:, start : start + group]).max(1)
            np.testing.assert_allclose(step[:, start], most / MOST[kind], rtol=2**-8)


@pytest.mark.parametrize(("kind", "zeros"), ALL)
def test_a_group_of_zeros_stays_zero_and_infinity_shows_in_its_scale(kind, zeros):
    w_nk = np.zeros((2, 256), np.float32)
    assert (np.asarray(full(rounding(jnp.asarray(w_nk), kind, zero_points=zeros))) == 0).all()
    w_nk[1, 255] = np.inf
    scale = np.asarray(rounding(jnp.asarray(w_nk), kind, zero_points=zeros).scale, np.float32)
    assert not np.isfinite(scale[-1, 1])
    assert np.isfinite(scale[:, 0]).all()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_bytes_and_int4_hold_the_same(kind):
    _, w = example(5, 130, kind, True)
    native = stored(w, "int4")
    assert native.values.dtype == jnp.int4
    assert native.shape == w.shape == (5, 130)
    np.testing.assert_array_equal(np.asarray(full(native)), np.asarray(full(w)))
    np.testing.assert_array_equal(np.asarray(stored(native, "bytes").values), np.asarray(w.values))


def test_the_even_input_is_in_the_low_half_of_a_byte():
    w = quantize(jnp.asarray([[7.0, -7.0, 3.0]]), "int4-g32")
    assert np.asarray(w.values).tolist() == [[0x97, 0x03]]


def compare(w: QuantizedWeight, tokens: int, dtype, implementation: str, close: float) -> None:
    x = jnp.asarray(drawn(tokens, w.inputs, seed=1), dtype)
    y = product(x, w, implementation=implementation)
    assert y.dtype == dtype
    assert y.shape == (tokens, w.outputs)
    meant = np.asarray(x, np.float64) @ by_hand(w).T
    np.testing.assert_allclose(
        np.asarray(y, np.float64), meant, atol=close * np.abs(meant).max(initial=1e-30), rtol=0
    )


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize(("kind", "zeros"), ALL)
@pytest.mark.parametrize("tokens", [1, 5])
def test_products_equal_float64(kind, zeros, tokens, implementation):
    for n, k in ((5, 7), (9, 200), (10, 128)):
        compare(example(n, k, kind, zeros)[1], tokens, jnp.float32, implementation, CLOSE)
    # One rounding of the result to bfloat16; on an XLA path also one of each weight.
    compare(example(9, 200, kind, zeros)[1], tokens, jnp.bfloat16, implementation, 2**-7)


@settings(deadline=None, max_examples=8)
@given(
    st.sampled_from([1, 2, 3, 4, 7, 16, 17, 40]), st.sampled_from([1, 4, 37]), st.sampled_from([1, 31, 65, 257]),
    st.sampled_from(ALL), st.sampled_from(HERE),
)  # fmt: skip
def test_any_shape_is_served(tokens, n, k, kind_zeros, implementation):
    if implementation == "cpu_native" and tokens > cpu_native.MOST_ROWS:
        implementation = "auto"
    compare(example(n, k, *kind_zeros)[1], tokens, jnp.float32, implementation, CLOSE)


@pytest.mark.parametrize("form", [xla.by_groups, xla.by_tiles, xla.by_loop])
@pytest.mark.parametrize("storage", ["bytes", "int4"])
def test_the_forms_of_xla_agree(form, storage):
    for kind, zeros in ALL:
        w = stored(example(9, 200, kind, zeros)[1], storage)
        x = drawn(3, 200, seed=2)
        meant = x.astype(np.float64) @ by_hand(w).T
        y = np.asarray(jax.jit(form)(jnp.asarray(x), w))
        np.testing.assert_allclose(y, meant, atol=CLOSE * np.abs(meant).max(), rtol=0)


def test_tiles_of_outputs_are_put_together_in_order(monkeypatch):
    monkeypatch.setattr(xla, "TILE_BYTES", 4 * 200 * 8)
    monkeypatch.setattr(xla, "LOOP_BYTES", 4 * 224 * 8)
    w = example(37, 200, "int4-g32", True)[1]
    assert [part.outputs for part in xla.parts_of(w)] == [8, 8, 8, 8, 5]
    compare(w, 3, jnp.float32, "xla", CLOSE)
    dy = drawn(3, 37)
    meant = dy.astype(np.float64) @ by_hand(w)
    np.testing.assert_allclose(
        np.asarray(xla.transposed(jnp.asarray(dy), w)), meant, atol=CLOSE * np.abs(meant).max()
    )


@pytest.mark.parametrize(("kind", "zeros"), ALL)
def test_the_gradient_is_that_of_x_alone(kind, zeros):
    w = example(9, 200, kind, zeros)[1]
    x, dy = jnp.asarray(drawn(2, 3, 200)), drawn(2, 3, 9, seed=3)
    _, pull = jax.vjp(lambda x, w: product(x, w), x, w)
    dx, dw = pull(jnp.asarray(dy))
    meant = dy.astype(np.float64) @ by_hand(w)
    np.testing.assert_allclose(np.asarray(dx), meant, atol=CLOSE * np.abs(meant).max())
    assert not np.asarray(dw.scale, np.float32).any()
    # Finite differences of the function itself, along one direction.
    way, step = jnp.asarray(drawn(2, 3, 200, seed=4)), 2.0**-6
    ends = [np.asarray(product(x + s * way, w), np.float64) for s in (step, -step)]
    slope = ((ends[0] - ends[1]) * dy).sum() / (2 * step)
    assert slope == pytest.approx(float((np.asarray(dx, np.float64) * np.asarray(way)).sum()), rel=2e-3)


def test_activations_in_int8_are_rounded_a_token_and_summed_exactly():
    w = example(9, 200, "int8", False)[1]
    x = drawn(4, 200) * np.asarray([[1e-3], [1], [50], [0]], np.float32)
    y = np.asarray(product(jnp.asarray(x), w, activations="int8"), np.float64)
    scale = np.abs(x).max(1, keepdims=True).astype(np.float32) / np.float32(127)
    q = np.round(x / np.where(scale == 0, 1, scale))
    meant = (q @ np.asarray(w.values, np.float64).T) * scale * np.asarray(w.scale, np.float64)
    np.testing.assert_allclose(y, meant, rtol=1e-6)
    # Half a step of each input, added up as errors that do not know of each other.
    exact = x.astype(np.float64) @ by_hand(w).T
    bound = 4 * scale / np.sqrt(12) * np.linalg.norm(by_hand(w), axis=1)
    assert (np.abs(y - exact) <= bound).all()


def mesh_of(name: str) -> jax.sharding.Mesh:
    return jax.make_mesh((4,), (name,), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])


def test_gradients_inside_shard_map_equal_those_of_one_device():
    w = example(16, 200, "int4-g32", False)[1]
    x, dy = jnp.asarray(drawn(8, 200)), jnp.asarray(drawn(8, 16, seed=1))
    mesh = mesh_of("data")
    rows, whole = jax.P("data", None), jax.P()

    def gradient(x, dy, w):
        return jax.vjp(lambda x: quantized_matmul(x, w), x)[1](dy)[0]

    cut = jax.shard_map(gradient, mesh=mesh, in_specs=(rows, rows, whole), out_specs=rows)
    np.testing.assert_allclose(
        np.asarray(jax.jit(cut)(x, dy, w)), np.asarray(gradient(x, dy, w)), rtol=1e-5, atol=1e-5
    )


def test_outputs_cut_over_devices_sum_to_the_whole_gradient():
    w = example(16, 200, "int4-g32", False)[1]
    x, dy = jnp.asarray(drawn(3, 200)), jnp.asarray(drawn(3, 16, seed=1))
    mesh = mesh_of("tensor")
    # Values by their rows, scales by their columns: a device has the groups of its own outputs.
    specs = QuantizedWeight(
        values=jax.P("tensor", None), scale=jax.P(None, "tensor"), zero=None, inputs=w.inputs, group=w.group
    )

    cut = jax.shard_map(
        quantized_matmul, mesh=mesh, in_specs=(jax.P(), specs), out_specs=jax.P(None, "tensor")
    )
    cut = jax.jit(cut)
    y, pull = jax.vjp(lambda x: cut(x, w), x)
    meant, whole = jax.vjp(lambda x: product(x, w), x)
    np.testing.assert_allclose(np.asarray(y), np.asarray(meant), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.asarray(pull(dy)[0]), np.asarray(whole(dy)[0]), rtol=1e-4, atol=1e-4)


def test_no_token_gives_nothing():
    assert quantized_matmul(jnp.zeros((2, 0, 7)), example(5, 7, "int8", False)[1]).shape == (2, 0, 5)


def test_what_cannot_be_is_refused_with_the_numbers():
    _, w = example(9, 200, "int4-g32", False)
    x = jnp.ones((2, 200))
    with pytest.raises(ValueError, match=r"x \(2, 7\) must end in the 200 inputs of w \(9, 200\)"):
        quantized_matmul(jnp.ones((2, 7)), w)
    with pytest.raises(TypeError, match="x must be bfloat16 or float32, not float16"):
        quantized_matmul(x.astype(jnp.float16), w)
    with pytest.raises(Unsupported, match="activations in int8 go with weights in int8, not in 4 bits"):
        quantized_matmul(x, w, activations="int8")
    with pytest.raises(
        Unsupported, match="'mosaic_gpu' cannot serve this call: it needs a GPU, and this is a cpu"
    ):
        quantized_matmul(x, w, implementation="mosaic_gpu")
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="int3"):
        quantize(jnp.ones((2, 3)), "int3")  # pyrefly: ignore [bad-argument-type]
    with pytest.raises(ValueError, match="int8 has no zero points"):
        quantize(jnp.ones((2, 3)), "int8", zero_points=True)
    wrong = QuantizedWeight(values=w.values, scale=w.scale[:-1], zero=None, inputs=200, group=32)
    with pytest.raises(
        ValueError, match=r"scale has shape \(6, 9\); 200 inputs in groups of 32 and 9 outputs want"
    ):
        quantized_matmul(x, wrong)


def test_each_chip_says_why_it_declines():
    w = example(9, 200, "int4-g32", False)[1]
    x = jnp.ones((2, 200), jnp.bfloat16)
    for chip, name, reason in (
        (Chip("tpu", "v5e"), "mosaic_tpu", "int4 lies two in a byte"),
        (Chip("gpu", "sm80"), "mosaic_gpu", "written for Hopper"),
        (Chip("gpu", "sm90"), "mosaic_gpu", "int4 lies two in a byte"),
    ):
        with compiling_for(chip), pytest.raises(Unsupported, match=reason):
            quantized_matmul(x, w, implementation=name)
    with compiling_for(Chip("tpu", "v5e")), pytest.raises(Unsupported, match=r"multiples of 128"):
        quantized_matmul(x, stored(w, "int4"), implementation="mosaic_tpu")


def placed(mesh, array, *spec):
    return jax.device_put(array, jax.NamedSharding(mesh, jax.P(*spec)))


# (tokens, inputs, outputs): over which axes; a second one for x's inputs where they come cut otherwise.
LAYOUTS = [
    (None, None, "tensor"),
    (None, "tensor", None),
    ("data", "tensor", None),
    ("data", "data", "tensor"),  # gathered along what cuts the tokens
    ("data", None, ("tensor", "data")),
]


@pytest.mark.parametrize("tokens_inputs_outputs", LAYOUTS)
@pytest.mark.parametrize(("kind", "zeros"), [("int8", False), ("int4-g32", True)])
def test_a_mesh_gives_the_product_and_gradient_of_one_device(kind, zeros, tokens_inputs_outputs):
    tokens, inputs, outputs = tokens_inputs_outputs
    mesh = jax.make_mesh((2, 4), ("data", "tensor"))
    w = example(16, 256, kind, zeros)[1]
    x, dy = jnp.asarray(drawn(4, 3, 256)), jnp.asarray(drawn(4, 3, 16, seed=1))
    meant, pull = jax.vjp(lambda x: product(x, w), x)
    groups = None if kind == "int8" else inputs
    cut = QuantizedWeight(
        values=placed(mesh, w.values, outputs, inputs), scale=placed(mesh, w.scale, groups, outputs),
        zero=None if w.zero is None else placed(mesh, w.zero, groups, outputs), inputs=w.inputs, group=w.group,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        y, pull_cut = jax.vjp(lambda x: product(x, cut), placed(mesh, x, tokens))
        np.testing.assert_allclose(np.asarray(y), np.asarray(meant), rtol=1e-5, atol=1e-4)
        dx = pull_cut(jax.device_put(dy, y.sharding))[0]
    np.testing.assert_allclose(np.asarray(dx), np.asarray(pull(dy)[0]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["int8", "int4-g32"])
def test_a_loop_on_a_mesh_has_the_gradients_of_one_device(kind):
    """What is the same in each turn of a differentiated loop is moved out of `jax.shard_map`; in pieces, an empty array
    that stands for no zero points would end the process when the program is compiled."""
    w, x = example(64, 64, kind, False)[1], jnp.asarray(drawn(8, 64))

    def loss(x, w):
        layer = lambda x, _: (x + quantized_matmul(x, w), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(layer, x, None, length=2)[0] ** 2)

    meant = jax.jit(jax.grad(loss))(x, w)
    mesh = jax.make_mesh((8,), ("data",))
    with jax.set_mesh(mesh):
        cut = placed(mesh, x, "data"), jax.tree.map(lambda a: placed(mesh, a), w)
        lowered = jax.jit(jax.grad(loss)).lower(*cut)
        assert not re.search("tensor<0x(?!index)", lowered.as_text())
        found = lowered.compile()(*cut)
    np.testing.assert_allclose(
        np.asarray(found), np.asarray(meant), rtol=1e-4, atol=1e-4 * np.abs(meant).max()
    )


def test_tokens_in_int8_have_one_scale_over_all_devices():
    mesh = jax.make_mesh((8,), ("tensor",))
    w, x = example(16, 256, "int8", False)[1], jnp.asarray(drawn(3, 256))
    cut = QuantizedWeight(
        values=placed(mesh, w.values, None, "tensor"),
        scale=placed(mesh, w.scale),
        zero=None,
        inputs=256,
        group=256,
    )
    with jax.set_mesh(mesh):
        found = product(placed(mesh, x), cut, activations="int8")
    np.testing.assert_allclose(
        np.asarray(found), np.asarray(product(x, w, activations="int8")), rtol=1e-5, atol=1e-4
    )


def test_inputs_that_are_no_whole_groups_are_gathered():
    mesh = jax.make_mesh((8,), ("tensor",))
    w, x = example(8, 192, "int4-g32", False)[1], jnp.asarray(drawn(3, 192))
    cut = QuantizedWeight(
        values=placed(mesh, w.values, None, "tensor"),
        scale=placed(mesh, w.scale),
        zero=None,
        inputs=192,
        group=32,
    )
    with jax.set_mesh(mesh):
        found = product(placed(mesh, x, None, "tensor"), cut)
    np.testing.assert_allclose(np.asarray(found), np.asarray(product(x, w)), rtol=1e-5, atol=1e-4)
