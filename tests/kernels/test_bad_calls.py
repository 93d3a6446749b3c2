"""Calls of kernels that cannot be served: one sentence with the numbers; and those of nothing, which can."""

from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from maxstack.kernels import Unsupported
from maxstack.kernels.attention import attention
from maxstack.kernels.cross_entropy import cross_entropy, token_log_probs
from maxstack.kernels.dispatch import Chip, compiling_for
from maxstack.kernels.grouped_matmul import grouped_matmul
from maxstack.kernels.paged_attention import (
    append_kv,
    append_latent,
    init_cache,
    init_latent_cache,
    latent_paged_attention,
    paged_attention,
)
from maxstack.kernels.quantized_matmul import quantize, quantized_matmul


@pytest.fixture(autouse=True)
def no_shape_checks():
    """Shape annotations are checked in tests only; a user meets the function's own words."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def shaped(*shape: int, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


Q, KV = shaped(1, 4, 6, 8), shaped(1, 4, 2, 8)
IDS = shaped(1, 4, dtype=jnp.int32)
ATTENTION: dict[str, Any] = {
    "rank": ((Q[0], KV, KV), {}, ValueError, r"q must be \[batch, position, heads, size\], not \(4, 6, 8\)"),
    "heads": ((Q, shaped(1, 4, 4, 8), shaped(1, 4, 4, 8)), {}, ValueError, "heads 6 must be a multiple of kv heads 4"),
    "no heads": ((Q, KV[:, :, :0], KV[:, :, :0]), {}, ValueError, r"k \(1, 4, 0, 8\) must have at least 1 head"),
    "lengths": ((Q, KV, KV[:, :3]), {}, ValueError, r"disagree: q \(1, 4, 6, 8\), k .*, v \(1, 3, 2, 8\)"),
    "types apart": ((Q, KV.astype(jnp.bfloat16), KV), {}, TypeError, "q is float32 and k bfloat16"),
    "integers": (tuple(a.astype(jnp.int32) for a in (Q, KV, KV)), {}, TypeError, "must be bfloat16.* not int32"),
    "8 bits": (tuple(a.astype(jnp.float8_e4m3fn) for a in (Q, KV, KV)), {}, TypeError, "not float8_e4m3fn"),
    "window": ((Q, KV, KV), {"window": 0}, ValueError, "window is 0 positions; it must be at least 1"),
    "cap": ((Q, KV, KV), {"softcap": 0.0}, ValueError, "softcap is 0.0; it must be positive"),
    "sinks": ((Q, KV, KV), {"sinks": shaped(2)}, ValueError, r"sinks \(2,\) must have one number for each of 6"),
    "ids": ((Q, KV, KV), {"segment_ids": IDS[:, :3]}, ValueError, r"of the queries are \(1, 3\), the queries \(1, 4"),
    "one id for two": ((Q, KV[:, :2], KV[:, :2]), {"positions": IDS}, ValueError, "4 queries and 2 keys need pos"),
    "ids of floats": ((Q, KV, KV), {"positions": shaped(1, 4)}, TypeError, "must be integers, not float32"),
    "name": ((Q, KV, KV), {"implementation": "triton"}, ValueError, "unknown implementation 'triton'; known: auto"),
}  # fmt: skip


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_refuses_with_the_numbers(case):
    arrays, options, error, words = ATTENTION[case]
    with pytest.raises(error, match=words):
        attention(*arrays, **options)


X, W, LABELS = shaped(4, 8), shaped(8, 10), shaped(4, dtype=jnp.int32)
CROSS_ENTROPY = {
    "rank of w": ((X, W[None], LABELS), {}, ValueError, r"w \[d, v\] .* not \(4, 8\) and \(1, 8, 10\)"),
    "rank of x": ((X[0, 0], W, LABELS[0]), {}, ValueError, r"x must be \[..., d\] .* not \(\) and"),
    "no vocabulary": ((X, W[:, :0], LABELS), {}, ValueError, r"hold something, not \(4, 8\) and \(8, 0\)"),
    "width": ((X[:, :7], W, LABELS), {}, ValueError, r"x has width 7, w_dv \(8, 10\) takes 8"),
    "labels": ((X, W, LABELS[:3]), {}, ValueError, r"labels \(3,\) must be the leading shape of x \(4, 8\)"),
    "types apart": ((X, W.astype(jnp.bfloat16), LABELS), {}, TypeError, "x is float32 and w bfloat16"),
    "integers": ((X.astype(int), W.astype(int), LABELS), {}, TypeError, "must be floating-point, not int"),
    "labels of floats": ((X, W, shaped(4)), {}, TypeError, "labels must be integers, not float32"),
    "cap": ((X, W, LABELS), {"softcap": -1.0}, ValueError, "softcap is -1.0; it must be positive"),
    "chunk": ((X, W, LABELS), {"chunk": 0}, ValueError, "chunk is 0 tokens"),
}


@pytest.mark.parametrize("function", [cross_entropy, token_log_probs], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CROSS_ENTROPY)
def test_cross_entropy_refuses_with_the_numbers(case, function):
    arrays, options, error, words = CROSS_ENTROPY[case]
    with pytest.raises(error, match=words):
        function(*arrays, **options)


TABLE, LENGTHS = np.zeros((2, 2), np.int32), np.array([3, 9], np.int32)


def latent(cache, **options):
    given = {"value_size": 6, "scale": 1.0} | options
    return latent_paged_attention(shaped(2, 4, 8), cache, TABLE, LENGTHS, **given)


def test_latents_are_refused_with_the_numbers():
    cache = init_latent_cache(4, 8, page=8, dtype="int8")
    with pytest.raises(ValueError, match=r"scale is None; pages of int8 take \(4, 8\)"):
        latent(cache._replace(scale=None))
    with pytest.raises(ValueError, match=r"scale is \(4, 7\); pages of int8 take \(4, 8\)"):
        latent(cache._replace(scale=shaped(4, 7)))
    with pytest.raises(TypeError, match=r"must be bfloat16, float32, int8 or int4 .* not float16"):
        latent(cache._replace(pages=shaped(4, 8, 8, dtype=jnp.float16), scale=None))
    with pytest.raises(ValueError, match="values are the first 9 of 8 components"):
        latent(cache, value_size=9)
    with pytest.raises(ValueError, match=r"latent_paged_attention: softcap is 0\.0"):
        latent(cache, softcap=0.0)


def test_what_is_appended_in_another_shape_is_refused_with_the_numbers():
    cache, new = init_cache(4, 2, 8, page=8), shaped(2, 1, 2, 8)
    latents, new_latents = init_latent_cache(4, 8, page=8), shaped(2, 1, 8)

    def both(error, words, *places):
        for append, arrays in ((append_kv, (cache, new, new)), (append_latent, (latents, new_latents))):
            with pytest.raises(error, match=f"{append.__name__}: {words}"):
                append(*arrays, *places)

    both(ValueError, r"the page table must be \[b, pages\], not \(2,\)", TABLE[0], LENGTHS)
    both(ValueError, r"lengths are \(1,\); a page table of 2 sequences wants \(2,\)", TABLE, LENGTHS[:1])
    both(ValueError, r"counts are \(1,\); a page table of 2 sequences", TABLE, LENGTHS, LENGTHS[:1])
    both(TypeError, "lengths must be integers, not float32", TABLE, LENGTHS.astype(np.float32))
    with pytest.raises(ValueError, match=r"latents are \(2, 8\); the cache takes \[b, t, 8\] with b 2"):
        append_latent(latents, new_latents[:, 0], TABLE, LENGTHS)


WIDE = shaped(1, 128, 2, 128, dtype=jnp.bfloat16)
CALLS = {
    "attention": lambda name: attention(WIDE, WIDE, WIDE, implementation=name),
    "paged_attention": lambda name: paged_attention(
        WIDE[0, :2], init_cache(4, 2, 128), TABLE, LENGTHS, implementation=name
    ),
    "quantized_matmul": lambda name: quantized_matmul(
        WIDE[0, :, 0], quantize(shaped(128, 128), "int8"), implementation=name
    ),
    "grouped_matmul": lambda name: grouped_matmul(
        WIDE[0, :, 0], shaped(2, 128, 128, dtype=jnp.bfloat16), jnp.asarray([100, 28]), implementation=name
    ),
}


@pytest.mark.parametrize(
    ("chip", "named", "words"),
    [
        (Chip("tpu", "v99"), "mosaic_tpu", "a TPU 'v99' is none that it was compiled for; known: v2, .*v7x"),
        (Chip("gpu", "sm130"), "mosaic_gpu", r"sm130.*Hopper|Hopper \(sm90\), and this is sm130"),
        (Chip("npu", "npu"), "mosaic_tpu", "it needs a TPU, and this is a npu"),
    ],
    ids=str,
)
@pytest.mark.parametrize("operation", CALLS)
def test_a_chip_nobody_has_heard_of_is_named_and_served_by_xla(operation, chip, named, words):
    with compiling_for(chip):
        with pytest.raises(Unsupported, match=rf"{operation}: '{named}' cannot serve this call: .*({words})"):
            CALLS[operation](named)
        assert np.isfinite(np.asarray(CALLS[operation]("auto"), np.float32)).all()


@pytest.mark.parametrize("implementation", ["auto", "xla", "reference"])
@pytest.mark.parametrize(("b", "t", "s"), [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_attention_of_nothing_is_nothing(b, t, s, implementation):
    q, kv, sinks = shaped(b, t, 4, 8), shaped(b, s, 2, 8), jnp.arange(4.0)

    def both(q, kv, sinks):
        return attention(q, kv, kv, sinks=sinks, causal=False, return_lse=True, implementation=implementation)

    out, lse = both(q, kv, None)
    assert out.shape == (b, t, 4, 8)
    assert not np.asarray(out).any()
    assert np.isneginf(lse).all()
    gradients = jax.grad(lambda *arrays: sum(map(jnp.sum, both(*arrays))), (0, 1, 2))(q, kv, sinks)
    # Of the log-sum-exp of sinks alone: one a query.
    wanted = np.zeros_like(q), np.zeros_like(kv), np.full(4, b * t if s == 0 else 0)
    for one, other in zip(gradients, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_cross_entropy_of_no_token_is_zero(implementation):
    def loss(x, w):
        return cross_entropy(x, w, LABELS[:0], z_loss=0.1, implementation=implementation)[0]

    value, (dx, dw) = jax.value_and_grad(loss, (0, 1))(X[:0], W)
    assert value == 0
    assert dx.shape == (0, 8)
    assert not np.asarray(dw).any()
    assert token_log_probs(X[:0], W, LABELS[:0], implementation=implementation)[0].shape == (0,)
