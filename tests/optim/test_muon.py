"""The orthogonalisation of Muon and the dealing out of matrices over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxstack.optim import matrix_dims, newton_schulz, orthogonalize
from maxstack.optim.deal import plan
from maxstack.optim.muon import MuonConfig, scale_by_muon
from tests.optim import references

FLOAT32 = jnp.dtype("float32")


def matrix(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8), (1, 5), (5, 1)])
def test_newton_schulz_maps_singular_values_and_keeps_singular_vectors(shape):
    x = matrix(shape)
    got = newton_schulz(jnp.asarray(x), steps=5, dtype=FLOAT32)
    # Float32 rounding, amplified for small singular values by at most 3.4^5 = 480.
    np.testing.assert_allclose(got, references.orthogonalized(x.astype(np.float64), 5), rtol=0, atol=3e-5)
    values = np.linalg.svd(np.asarray(got, np.float64), compute_uv=False)
    if 1 not in shape:
        assert values.max() < 1.3, "the iteration overshoots by at most 20 %"
        assert np.median(values) > 0.6, "most directions come out near 1"


def test_newton_schulz_in_bfloat16_keeps_singular_values_near_one():
    got = newton_schulz(jnp.asarray(matrix((16, 32))), steps=5, dtype=jnp.dtype("bfloat16"))
    values = np.linalg.svd(np.asarray(got, np.float64), compute_uv=False)
    assert got.dtype == jnp.float32
    assert 0.6 < values.min() <= values.max() < 1.3


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1.0, 1e18, 1e30])
def test_newton_schulz_does_not_depend_on_scale(scale):
    x = matrix((6, 10))
    one = newton_schulz(jnp.asarray(x), steps=5, dtype=FLOAT32)
    # Scaling by a number that is no power of two rounds each entry once; amplified as above.
    got = newton_schulz(jnp.asarray(x * np.float32(scale)), steps=5, dtype=FLOAT32)
    np.testing.assert_allclose(got, one, rtol=0, atol=1e-4)


def test_newton_schulz_of_zero_is_zero():
    assert not newton_schulz(jnp.zeros((4, 6)), steps=5, dtype=FLOAT32).any()


def test_updates_equal_those_of_optax_on_one_matrix():
    # Without Nesterov, since optax corrects the bias of both terms, which changes their mixture.
    ours = scale_by_muon(MuonConfig(nesterov=False, update_rms=0.0), {"w": ("embed", "mlp")}, FLOAT32)
    theirs = optax.contrib.scale_by_muon(
        nesterov=False, weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers()}
    )
    params = {"w": jnp.asarray(matrix((8, 24)))}
    one, two = ours.init(params), theirs.init(params)
    for seed in range(3):
        grads = {"w": jnp.asarray(matrix((8, 24), seed + 5))}
        mine, one = ours.update(grads, one)
        other, two = theirs.update(grads, two)
        # Theirs is not scaled by the shape; both amplify rounding by up to 480.
        np.testing.assert_allclose(
            np.asarray(mine["w"]), np.sqrt(24 / 8) * np.asarray(other["w"]), rtol=0, atol=1e-4
        )


LEAVES = {
    ("layers", "embed", "heads", "head_dim"): (6, 16, 4, 4),
    ("layers", "heads", "head_dim", "embed"): (3, 4, 4, 16),
    ("layers", "expert", "embed", "mlp"): (2, 4, 16, 8),
    ("embed", "mlp"): (16, 8),
}
SPECS = {"embed": ("data", "fsdp"), "heads": ("tensor",), "mlp": ("tensor",), "expert": ("fsdp",)}


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
@pytest.mark.parametrize("axes", LEAVES, ids="-".join)
def test_matrices_dealt_over_a_mesh_come_out_the_same(axes, sizes):
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"))
    x, dims = matrix(LEAVES[axes]), matrix_dims(axes)
    whole = orthogonalize(jnp.asarray(x), dims, steps=5, dtype=FLOAT32)
    spec, used = [], set()
    for name, size in zip(axes, x.shape, strict=True):
        free = tuple(a for a in SPECS.get(name, ()) if a not in used)
        ways = int(np.prod([mesh.shape[a] for a in free]))
        spec.append(free if free and size % ways == 0 else None)
        used |= set(free) if spec[-1] else set()
    with jax.set_mesh(mesh):
        home = jax.NamedSharding(mesh, jax.P(*spec))
        got = jax.jit(lambda y: orthogonalize(y, dims, steps=5, dtype=FLOAT32))(jax.device_put(x, home))
    assert got.sharding.is_equivalent_to(home, x.ndim)
    # The same products of the same whole matrices; only how the loop is compiled differs.
    np.testing.assert_allclose(got, whole, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("optimized")
def test_no_device_computes_all_matrices_of_a_stack():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
    dims = matrix_dims(("layers", "embed", "mlp"))
    with jax.set_mesh(mesh):
        x = jax.device_put(matrix((16, 32, 32)), jax.NamedSharding(mesh, jax.P(None, "fsdp", "tensor")))
        function = jax.jit(lambda y: orthogonalize(y, dims, steps=5, dtype=FLOAT32))
        text = str(function.lower(x).compile().as_text())
    assert "f32[2,32,32]" in text, "two of the sixteen matrices on each of eight devices"
    assert "f32[16,32,32]" not in text, "the stack is never whole on one device"


def test_plan_moves_one_mesh_axis_at_a_time_and_pads_only_what_is_left():
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor")).abstract_mesh
    deal = plan((3, 16, 8), matrix_dims(("layers", "embed", "mlp")), ((), ("fsdp",), ("tensor",)), mesh)
    assert deal.stages == (
        ((), ("fsdp",), ("tensor",)),
        (("fsdp",), (), ("tensor",)),
        (("fsdp", "tensor"), (), ()),
    )
    assert (deal.dim, deal.padding) == (0, 1), "three matrices on four devices; the data axis repeats them"
