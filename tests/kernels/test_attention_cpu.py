"""Attention of whole sequences on a CPU: the C++ against float64 numpy, blocks that nobody sees skipped, no bit changed
by company."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxstack.kernels import Unsupported, cpu_native
from maxstack.kernels.attention import attention, native
from maxstack.kernels.attention.blocks import Blocks

NATIVE = pytest.mark.skipif(not cpu_native.available(), reason="needs a C++ compiler")
# Float32 against float64: a few roundings of sums of hundreds of terms of size 1.
CLOSE = {"rtol": 5e-5, "atol": 5e-5}
RUN = jax.jit(
    lambda q, k, v, **options: attention(q, k, v, return_lse=True, **options),
    static_argnames=("causal", "window", "softcap", "scale", "implementation", "config"),
)


@pytest.fixture(scope="module", autouse=True)
def few_queries():
    """Small shapes are tried that "auto" leaves to XLA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LEAST_QUERIES", 32)
        yield


def inputs(b, t, s, heads, sizes, seed=0, dtype=jnp.float32):
    (kv, group), (h, w) = heads, sizes
    random = np.random.default_rng(seed)
    shapes = ((b, t, kv * group, h), (b, s, kv, h), (b, s, kv, w))
    return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def float64(q, k, v, *, segments, positions, causal, window, softcap, sinks):
    """Output and log-sum-exp, all pairs at once."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    distance = positions[0][:, :, None] - positions[1][:, None]
    seen = np.ones(distance.shape, bool)
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance < window
    if segments is not None:
        seen &= (segments[0][:, :, None] == segments[1][:, None]) & (segments[1] > 0)[:, None]
    logits = np.where(seen[:, None], logits, -np.inf)
    with_sink = np.concatenate([logits, np.broadcast_to(sinks[:, None, None], (*logits.shape[:3], 1))], -1)
    lse = np.logaddexp.reduce(logits if sinks[0] == -np.inf else with_sink, axis=-1)
    weights = np.exp(logits - np.where(lse == -np.inf, 0, lse)[..., None])
    return np.einsum("bnts,bsnw->btnw", weights, v), np.swapaxes(lse, 1, 2)


@NATIVE
@settings(max_examples=8, deadline=None)
@given(
    lengths=st.sampled_from([(32, 32), (33, 70), (200, 130), (100, 300)]),
    heads=st.sampled_from([(1, 1), (2, 3), (1, 5), (1, 100)]),
    sizes=st.sampled_from([(8, 8), (16, 24), (5, 3), (48, 32), (64, 64)]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 40]),
    softcap=st.sampled_from([None, 2.0]),
    packed=st.booleans(),
    placed=st.booleans(),
    sunk=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_equals_float64(lengths, heads, sizes, causal, window, softcap, packed, placed, sunk, seed):
    t, s = lengths
    random = np.random.default_rng(seed)
    q, k, v = inputs(2, t, s, heads, sizes, seed)
    positions = np.tile(np.arange(t), (2, 1)), np.tile(np.arange(s), (2, 1))
    if placed:
        positions = random.integers(0, s, (2, t)), np.sort(random.integers(0, s, (2, s)), 1)
    segments = np.sort(random.integers(0, 4, (2, t)), 1), np.sort(random.integers(0, 4, (2, s)), 1)
    sinks = random.normal(size=q.shape[2]) if sunk else np.full(q.shape[2], -np.inf)
    options = {"causal": causal, "window": window, "softcap": softcap}
    wanted = float64(
        q, k, v, segments=segments if packed else None, positions=positions, sinks=sinks, **options
    )
    ids = lambda pair: tuple(jnp.asarray(part, jnp.int32) for part in pair)  # noqa: E731
    found = RUN(
        q, k, v, segment_ids=ids(segments) if packed else None, positions=ids(positions) if placed else None,
        sinks=jnp.asarray(sinks, jnp.float32) if sunk else None, implementation="cpu_native", **options,
    )  # fmt: skip
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, **CLOSE)


@NATIVE
@pytest.mark.parametrize(
    ("length", "heads", "sizes", "options"),
    [
        (40, (1, 1), (5, 3), {"sunk": True}),
        (200, (2, 3), (16, 24), {"window": 30}),
        (1200, (1, 4), (16, 8), {"packed": True}),  # three parts of the keys
        (1200, (2, 1), (8, 8), {"packed": True, "softcap": 2.0, "sunk": True, "causal": False}),
    ],
)
def test_gradients_equal_those_of_the_reference(length, heads, sizes, options):
    q, k, v = inputs(2, length, length, heads, sizes)
    random = np.random.default_rng(1)
    sinks = jnp.asarray(random.normal(size=q.shape[2]), jnp.float32) if options.pop("sunk", False) else None
    segments = jnp.asarray(np.sort(random.integers(0, 5, (2, length)), 1), jnp.int32)
    options["segment_ids"] = segments if options.pop("packed", False) else None
    weights = [jnp.asarray(random.normal(size=(2, length, q.shape[2], sizes[1])), jnp.float32)]

    def loss(arrays, implementation):
        out, lse = attention(
            *arrays[:3], sinks=arrays[3], return_lse=True, implementation=implementation, **options
        )
        return jnp.sum(out * weights[0]) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0))

    found, wanted = (
        jax.jit(jax.grad(loss), static_argnums=1)((q, k, v, sinks), name)
        for name in ("cpu_native", "reference")
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


def packings():
    """Segments of two rows that are packed in different ways, padding behind the second's last document."""
    return np.stack([np.repeat([1, 2, 3], [64, 128, 64]), np.repeat([1, 2, 0], [128, 64, 64])]).astype(
        np.int32
    )


@pytest.mark.parametrize(
    ("implementation", "config"), [pytest.param("cpu_native", None, marks=NATIVE), ("xla", Blocks(query=64, key=64))]
)  # fmt: skip
def test_blocks_that_no_query_of_a_row_sees_are_not_computed_forward_nor_backward(implementation, config):
    segments = packings()
    q, k, v = inputs(2, 256, 256, (1, 3), (8, 8))  # 32 queries a block of the C++: no block has two documents
    document = segments[:, None] == np.arange(1, 4)[:, None]  # [row, document, token]

    def loss(arrays, which):
        out = attention(
            *arrays, segment_ids=jnp.asarray(segments), implementation=implementation, config=config
        )
        return jnp.sum(jnp.where(which[..., None, None], jnp.sin(out), 0.0))

    gradients = jax.jit(jax.value_and_grad(loss))
    clean = gradients((q, k, v), document[:, 1])
    # Keys and values of the other documents are nan: 0 times nan would show that they were touched.
    spoiled = [jnp.where(document[:, 1][..., None, None], a, jnp.nan) for a in (k, v)]
    found = gradients((q, *spoiled), document[:, 1])
    np.testing.assert_array_equal(found[0], clean[0])
    for one, other in zip(found[1], clean[1], strict=True):
        np.testing.assert_array_equal(np.asarray(one)[document[:, 1]], np.asarray(other)[document[:, 1]])


@NATIVE
def test_a_result_has_the_same_bits_alone_in_a_batch_and_in_a_longer_row():
    q, k, v = inputs(3, 230, 230, (2, 3), (24, 16))
    options = {"window": 100, "implementation": "cpu_native"}
    out, lse = RUN(q, k, v, **options)
    for b, length in ((0, 230), (2, 230), (1, 101), (2, 64)):
        cut = [a[b : b + 1, :length] for a in (q, k, v)]
        alone = RUN(*cut, **options)
        np.testing.assert_array_equal(alone[0][0], out[b, :length])
        np.testing.assert_array_equal(alone[1][0], lse[b, :length])

    def gradients(q, k, v):
        return jax.vjp(lambda *a: attention(*a, implementation="cpu_native"), q, k, v)[1](
            jnp.ones_like(q[..., :16])
        )

    whole = jax.jit(gradients)(q, k, v)
    alone = jax.jit(gradients)(*(a[1:2] for a in (q, k, v)))
    for one, other in zip(alone, whole, strict=True):
        np.testing.assert_array_equal(one[0], other[1])


@NATIVE
def test_bfloat16_is_rounded_once():
    q, k, v = inputs(1, 100, 100, (1, 2), (16, 16), dtype=jnp.bfloat16)

    def results(arrays):
        out, back = jax.vjp(lambda *a: attention(*a, implementation="cpu_native"), *arrays)
        return out, *back(jnp.ones_like(out))

    narrow = results((q, k, v))
    wide = results(tuple(a.astype(jnp.float32) for a in (q, k, v)))
    np.testing.assert_array_equal(narrow[0], wide[0].astype(jnp.bfloat16))
    for one, other in zip(narrow[1:], wide[1:], strict=True):
        # delta comes from the rounded output; so a unit of the last place, and of terms that cancel more.
        np.testing.assert_allclose(one.astype(np.float32), other, rtol=1e-2, atol=2e-2)


@NATIVE
def test_what_it_does_not_serve_it_declines_with_the_number():
    q, k, v = inputs(1, 8, 8, (1, 1), (8, 8))
    with pytest.raises(Unsupported, match="8 queries; it is for 32 and more"):
        attention(q, k, v, implementation="cpu_native")
    with pytest.raises(Unsupported, match="float16"):
        attention(*(a.astype(jnp.float16) for a in (q, k, v)), implementation="cpu_native")
    with pytest.raises(Unsupported, match="config is Blocks"):
        attention(q, k, v, implementation="cpu_native", config=Blocks())
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    q, k, v = inputs(4, 32, 32, (1, 1), (8, 8))
    wanted = attention(q, k, v, implementation="xla")
    with jax.set_mesh(mesh):
        cut = [jax.device_put(a, jax.NamedSharding(mesh, jax.P("data"))) for a in (q, k, v)]
        with pytest.raises(Unsupported, match="XLA deals out what lies on the axes data"):
            jax.jit(partial(attention, implementation="cpu_native"))(*cut)
        np.testing.assert_allclose(jax.jit(attention)(*cut), wanted, **CLOSE)


@NATIVE
def test_layers_on_eight_devices_learn_what_they_learn_on_one():
    """Rows and heads are cut; layers are a loop, made again in the backward pass but for what a policy keeps."""
    q, k, v = inputs(4, 72, 72, (4, 2), (8, 8))
    scale = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8)), jnp.float32)
    sinks = jnp.linspace(-1.0, 1.0, 8)
    segments = jnp.asarray(np.sort(np.random.default_rng(2).integers(0, 3, (4, 72)), 1), jnp.int32)
    policy = jax.checkpoint_policies.save_only_these_names("attn_out", "attn_lse")

    def loss(q, k, v, scale, sinks, segments, implementation):
        @partial(jax.checkpoint, policy=policy)
        def layer(x, scale):
            given = {"segment_ids": segments, "sinks": sinks, "implementation": implementation}
            return x + attention(x * scale, k, v, **given), None

        return jnp.sum(jax.lax.scan(layer, q, scale)[0] ** 2)

    arrays = (q, k, v, scale, sinks)
    gradients = jax.jit(jax.value_and_grad(loss, range(5)), static_argnums=6)
    wanted = gradients(*arrays, segments, "reference")
    explicit = (jax.sharding.AxisType.Explicit,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), explicit)
    with jax.set_mesh(mesh):
        rows, heads = jax.P(("data", "fsdp")), jax.P(("data", "fsdp"), None, "tensor")
        specs = (heads, heads, heads, jax.P(), jax.P("tensor"), rows)
        cut = [
            jax.device_put(a, jax.NamedSharding(mesh, spec))
            for a, spec in zip((*arrays, segments), specs, strict=True)
        ]
        lowered = gradients.lower(*cut, "cpu_native")
        # An empty array that comes into a `shard_map` in pieces ends the process when it is compiled.
        assert not re.search("tensor<0x(?!index)", lowered.as_text())
        program = lowered.compile()
        assert program.as_text().count("maxstack_attention_backward") > 0
        found = program(*cut)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4 * float(jnp.abs(other).max()))
