"""Attention and cross-entropy against float64 numpy, and on 8 devices against one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack import sharding
from maxstack.kernels import Unsupported
from maxstack.kernels.attention import attention
from maxstack.kernels.cross_entropy import cross_entropy, token_log_probs
from maxstack.sharding import MeshConfig

B, T, S, N, K, H, W = 2, 5, 9, 4, 2, 8, 6
# Float32 inputs of size 1 against float64: a few roundings of sums of tens of terms.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def brute_force(q, k, v, *, segments, positions, causal, window, softcap, sinks):
    """Softmax attention, one query, head and row at a time."""
    heads, size, group = *q.shape[2:], q.shape[2] // k.shape[2]
    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.full(q.shape[:3], -np.inf)
    for b, t, n in itertools.product(*map(range, q.shape[:2]), range(heads)):
        logits = {}
        for s in range(k.shape[1]):
            distance = positions[0][b, t] - positions[1][b, s]
            hidden = (causal and distance < 0) or (window is not None and distance >= window)
            if segments is not None:
                hidden |= segments[0][b, t] != segments[1][b, s] or segments[1][b, s] == 0
            if not hidden:
                logit = q[b, t, n] @ k[b, s, n // group] / np.sqrt(size)
                logits[s] = logit if softcap is None else softcap * np.tanh(logit / softcap)
        terms = list(logits.values()) + ([] if sinks is None else [sinks[n]])
        if terms:
            lse[b, t, n] = np.logaddexp.reduce(terms)
            for s, logit in logits.items():
                out[b, t, n] += np.exp(logit - lse[b, t, n]) * v[b, s, n // group]
    return out, lse


def inputs(seed: int = 0):
    random = np.random.default_rng(seed)
    q, k, v = (random.normal(size=shape) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, W)))
    segments = (random.integers(1, 3, (B, T)), np.sort(random.integers(0, 3, (B, S)), 1))
    positions = (np.sort(random.integers(0, S, (B, T)), 1), np.tile(np.arange(S), (B, 1)))
    return q, k, v, segments, positions, random.normal(size=N)


OPTIONS = list(itertools.product((True, False), (None, 3), (None, 2.0), (False, True), (False, True)))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(("causal", "window", "softcap", "packed", "sunk"), OPTIONS)
def test_attention_equals_brute_force(implementation, causal, window, softcap, packed, sunk):
    q, k, v, segments, positions, sinks = inputs()
    options = {"causal": causal, "window": window, "softcap": softcap}
    wanted = brute_force(
        q, k, v, segments=segments if packed else None, positions=positions, sinks=sinks if sunk else None, **options
    )  # fmt: skip
    as_ids = lambda pair: tuple(jnp.asarray(part, jnp.int32) for part in pair)  # noqa: E731
    found = attention(
        *(jnp.asarray(a, jnp.float32) for a in (q, k, v)), positions=as_ids(positions), return_lse=True,
        segment_ids=as_ids(segments) if packed else None, implementation=implementation,
        sinks=jnp.asarray(sinks, jnp.float32) if sunk else None, **options,
    )  # fmt: skip
    np.testing.assert_allclose(found[0], wanted[0], **CLOSE)
    np.testing.assert_allclose(found[1], wanted[1], **CLOSE)


@pytest.mark.parametrize(("length", "window"), [(16, None), (700, None), (700, 100), (1500, 200)])
def test_blocked_gradients_equal_the_reference_at_lengths_that_divide_by_no_block(length, window):
    random = np.random.default_rng(1)
    q, k, v = (jnp.asarray(random.normal(size=(1, length, n, H)), jnp.float32) for n in (2, 1, 1))
    segments = jnp.asarray(np.sort(random.integers(0, 4, (1, length)), 1), jnp.int32)

    def loss(arrays, implementation):
        out, lse = attention(
            *arrays, segment_ids=segments, window=window, return_lse=True, implementation=implementation
        )
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0) * 1e-2)

    found, wanted = (jax.grad(loss)((q, k, v), name) for name in ("xla", "reference"))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)], ids=str)
def test_attention_and_its_gradients_on_a_mesh_equal_one_device(mesh):
    random = np.random.default_rng(2)
    arrays = [jnp.asarray(random.normal(size=(8, 16, n, H)), jnp.float32) for n in (4, 2, 2)]
    segments = jnp.ones((8, 16), jnp.int32)

    def loss(arrays, segments):
        return jnp.sum(jnp.sin(attention(*arrays, segment_ids=segments)))

    wanted = jax.grad(loss)(arrays, segments)
    where = sharding.build_mesh(mesh)
    with jax.set_mesh(where):
        spec = sharding.present(where, jax.P(sharding.BATCH_AXES, None, "tensor", None))
        placed = jax.device_put(arrays, jax.NamedSharding(where, spec))
        found = jax.jit(jax.grad(loss))(placed, jax.device_put(segments, sharding.batch_sharding(where)))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(jax.device_get(one), other, **CLOSE)


def test_named_backends_that_are_not_there_say_so():
    q = jnp.ones((1, 2, 1, 4))
    with pytest.raises(Unsupported, match="mosaic_gpu"):
        attention(q, q, q, implementation="mosaic_gpu")


def nll_and_lse(x, w, labels, softcap):
    logits = x @ w
    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
    lse = np.logaddexp.reduce(logits, axis=-1)
    return lse - np.take_along_axis(logits, labels[:, None], 1)[:, 0], lse


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [None, 8])
def test_cross_entropy_and_its_gradients_equal_float64(softcap, chunk):
    random = np.random.default_rng(3)
    x, w = random.normal(size=(24, 8)), random.normal(size=(8, 50))
    labels, weights = random.integers(0, 50, 24), (random.random(24) < 0.7).astype(np.float64)
    nll, lse = nll_and_lse(x, w, labels, softcap)
    a = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    b = jnp.asarray(labels, jnp.int32), jnp.asarray(weights, jnp.float32)

    def ours(x, w):
        return cross_entropy(x, w, *b, z_loss=0.01, softcap=softcap, chunk=chunk)

    (loss, found), (dx, dw) = jax.value_and_grad(ours, (0, 1), has_aux=True)(*a)
    np.testing.assert_allclose(loss, np.sum(weights * (nll + 0.01 * lse**2)), rtol=1e-5)
    np.testing.assert_allclose(found.nll, nll * (weights > 0), **CLOSE)
    np.testing.assert_allclose(found.lse, lse * (weights > 0), **CLOSE)

    def objective(x, w):
        n, z = nll_and_lse(x, w, labels, softcap)
        return np.sum(weights * (n + 0.01 * z**2))

    step = 1e-6
    for grad, (i, j), which in ((dx, (5, 2), 0), (dw, (3, 7), 1), (dw, (1, int(labels[0])), 1)):
        moved = [x.copy(), w.copy()], [x.copy(), w.copy()]
        moved[0][which][i, j] += step
        moved[1][which][i, j] -= step
        slope = (objective(*moved[0]) - objective(*moved[1])) / (2 * step)
        np.testing.assert_allclose(grad[i, j], slope, rtol=1e-4, atol=1e-5)
    log_probs, _ = token_log_probs(*a, b[0], softcap=softcap)
    np.testing.assert_allclose(log_probs, -nll, **CLOSE)


def test_chunks_of_tokens_without_a_weight_are_not_computed():
    random = np.random.default_rng(4)
    labels, kept = jnp.asarray(random.integers(0, 50, (2, 12)), jnp.int32), np.zeros((2, 12), bool)
    kept[0, [1, 5, 11]] = kept[1, [0, 2, 3, 9, 10]] = True  # a chunk of 8, scattered
    x = jnp.asarray(np.where(kept[..., None], random.normal(size=(2, 12, 8)), np.nan), jnp.float32)
    w = jnp.asarray(random.normal(size=(8, 50)), jnp.float32)

    def loss(x, w, weights, labels):
        return cross_entropy(x, w, labels, weights, z_loss=0.01, chunk=8)

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (total, found), (dx, dw) = run(x, w, jnp.asarray(kept, jnp.float32), labels)
    wanted_x, wanted_labels = x[kept], labels[kept]
    (alone, alone_found), (alone_dx, alone_dw) = run(wanted_x, w, jnp.ones(8), wanted_labels)
    np.testing.assert_allclose(total, alone, rtol=1e-6)
    np.testing.assert_allclose(dw, alone_dw, **CLOSE)
    np.testing.assert_allclose(dx[kept], alone_dx, **CLOSE)
    np.testing.assert_allclose(found.nll[kept], alone_found.nll, **CLOSE)
    assert not np.asarray(dx)[~kept].any()
    assert not np.asarray(found.nll)[~kept].any()
    assert float(jax.jit(loss)(x, w, jnp.asarray(kept, jnp.float32), labels)[0]) == pytest.approx(
        float(alone)
    )


def test_devices_with_unequal_shares_of_weighed_tokens_give_the_gradients_of_one():
    random = np.random.default_rng(5)
    labels = random.integers(0, 48, (8, 16)).astype(np.int32)
    weights = np.zeros((8, 16), np.float32)
    weights[0], weights[5, 3], weights[6:, ::2] = 1.0, 2.0, 0.5  # of two rows a device: all, none, few, half
    x, w = random.normal(size=(8, 16, 8)).astype(np.float32), random.normal(size=(8, 48)).astype(np.float32)

    def loss(x, w, labels, weights):
        return cross_entropy(x, w, labels, weights, z_loss=0.01, chunk=4)[0]

    one = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, w, labels, weights)
    mesh = sharding.build_mesh(MeshConfig(data=4, fsdp=1, tensor=2), jax.devices()[:8])
    with jax.set_mesh(mesh):
        rows = jax.P("data")
        cut = [jax.device_put(a, jax.NamedSharding(mesh, spec)) for a, spec in (
            (x, rows), (w, jax.P(None, "tensor")), (labels, rows), (weights, rows),
        )]  # fmt: skip
        eight = jax.jit(jax.value_and_grad(loss, (0, 1)))(*cut)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), eight, one)
