"""Any mesh gives the same logits, losses and gradients as one device, up to the order of float32 sums."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack import sharding
from maxstack.kernels.cross_entropy import cross_entropy
from maxstack.models import tree
from maxstack.models.product import product
from maxstack.sharding import MeshConfig
from tests.models.tiny import CONFIGS, QUICK, VOCAB, build

ROWS, LENGTH = 8, 16
MESHES = {
    "data 8": MeshConfig(data=8, fsdp=1),
    "fsdp 8": MeshConfig(fsdp=8),
    "fsdp 4, tensor 2": MeshConfig(fsdp=4, tensor=2),
    "data 2, fsdp 2, tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "data 4, fsdp 2, zero 1": MeshConfig(data=4, fsdp=2, zero=1),
}
CASES = [
    *(("grouped", mesh) for mesh in ("fsdp 8", "fsdp 4, tensor 2", "data 4, fsdp 2, zero 1")),
    *(
        pytest.param("grouped", mesh, marks=pytest.mark.slow)
        for mesh in ("data 8", "data 2, fsdp 2, tensor 2")
    ),
    ("window", "data 2, fsdp 2, tensor 2"),
    ("latent", "data 2, fsdp 2, tensor 2"),
    pytest.param("mixture", "fsdp 8", marks=pytest.mark.slow),
    ("mixture", "data 2, fsdp 2, tensor 2"),
    pytest.param("clamped mixture", "fsdp 8", marks=pytest.mark.slow),
    ("clamped mixture", "data 2, fsdp 2, tensor 2"),
]
# Float32 sums over 128 tokens and up to 48 features, split up to 8 ways and so added in another order. The gradients
# of one device differ by 4e-5 from its own when the compiler optimises less or the rows come in another order.
LOSS_BOUND = 1e-6  # relative; 2e-7 was measured
GRADIENT_BOUND = 2e-4  # of the largest entry of each array; 5e-5 was measured
LOGITS_BOUND = 1e-4  # of logits of size 1 to 3; 2e-5 was measured

Rows = dict[str, Any]


def rows() -> Rows:
    """Two documents a row and padding, at other places in each row; labels are the next tokens of the document."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for row in range(ROWS):
        first, last = rng.integers(3, 8), rng.integers(9, LENGTH + 1)
        at = np.arange(last)
        segments[row, :last] = 1 + (at >= first)
        positions[row, :last] = np.where(at < first, at, at - first)
    weights = ((segments == np.roll(segments, -1, 1)) & (segments > 0)).astype(np.float32)
    weights[:, -1] = 0.0
    return {
        "tokens": tokens, "segments": segments, "positions": positions, "labels": np.roll(tokens, -1, 1),
        "weights": weights,
    }  # fmt: skip


def outcome(name: str, arrays: dict[str, Any], batch: Rows) -> tuple:
    """((loss, (logits, load of each expert)), gradients by name)."""
    model = tree.abstract(lambda: CONFIGS[name].build(jax.random.key(0)))

    def loss(arrays: dict[str, Any]) -> tuple:
        full = tree.rebuild(model, arrays)
        x, reports = full.hidden(batch["tokens"], batch["segments"], batch["positions"])
        total, _ = cross_entropy(
            x, full.unembedding(), batch["labels"], batch["weights"], z_loss=1e-3,
            softcap=full.config.logit_softcap,
        )  # fmt: skip
        moe = [report["moe_loss"].sum() for report in reports.values() if "moe_loss" in report]
        load = [report["expert_load"] for report in reports.values() if "expert_load" in report]
        return total / batch["weights"].sum() + sum(moe), (full.logits(x), load)

    return jax.value_and_grad(loss, has_aux=True)(arrays)


@cache
def on_one_device(name: str) -> tuple:
    arrays = tree.leaves(build(CONFIGS[name]))
    return jax.jit(lambda arrays, batch: outcome(name, arrays, batch), compiler_options=QUICK)(arrays, rows())


def on_mesh(name: str, config: MeshConfig) -> tuple:
    mesh = sharding.build_mesh(config, jax.devices()[:8])
    model = build(CONFIGS[name])
    held = sharding.weight_shardings(mesh, tree.axes(model), "parameters", config.zero)
    arrays = {leaf: jax.device_put(value, held[leaf]) for leaf, value in tree.leaves(model).items()}
    batch = {key: jax.device_put(value, sharding.batch_sharding(mesh)) for key, value in rows().items()}
    with jax.set_mesh(mesh):
        run = jax.jit(lambda arrays, batch: outcome(name, arrays, batch), compiler_options=QUICK)
        return held, run(arrays, batch)


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_a_mesh_gives_the_logits_losses_and_gradients_of_one_device(name, mesh):
    (loss, (logits, load)), grads = on_one_device(name)
    held, ((given_loss, (given_logits, given_load)), given_grads) = on_mesh(name, MESHES[mesh])
    np.testing.assert_allclose(given_loss, loss, rtol=LOSS_BOUND)
    np.testing.assert_allclose(given_logits, logits, atol=LOGITS_BOUND, rtol=LOGITS_BOUND)
    for given, wanted in zip(given_load, load, strict=True):
        assert np.array_equal(given, wanted)
    for leaf, wanted in grads.items():
        bound = GRADIENT_BOUND * float(np.abs(wanted).max()) + 1e-9
        np.testing.assert_allclose(given_grads[leaf], wanted, atol=bound, rtol=0, err_msg=leaf)
        assert given_grads[leaf].sharding.is_equivalent_to(held[leaf], wanted.ndim), leaf


def scanned(jaxpr: Any, shape: tuple[int, ...]) -> list[Any]:
    """Types of the scans' outputs, at any depth, of this shape."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            found += [out.aval for out in equation.outvars if out.aval.shape == shape]
        for value in jax.tree.leaves(dict(equation.params), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            found += scanned(inner, shape) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("name", ["grouped", "mixture"])
def test_gradients_of_a_layer_are_cut_before_the_next_layer_is_reached(name):
    """Else a scan keeps the whole gradients of all layers on every device."""
    mesh = sharding.build_mesh(MeshConfig(fsdp=8), jax.devices()[:8])
    model = build(CONFIGS[name])
    held = sharding.weight_shardings(mesh, tree.axes(model), "parameters", 3)
    arrays = {leaf: jax.device_put(value, held[leaf]) for leaf, value in tree.leaves(model).items()}
    tokens = jax.device_put(rows()["tokens"], sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        run = jax.grad(lambda arrays: tree.rebuild(model, arrays).hidden(tokens)[0].sum())
        jaxpr = jax.make_jaxpr(run)(arrays)
    large = {leaf: a.shape for leaf, a in arrays.items() if "stacks" in leaf and "fsdp" in held[leaf].spec}
    assert len(large) >= 7
    for leaf, shape in large.items():
        kinds = scanned(jaxpr.jaxpr, shape)
        assert kinds, leaf
        assert all("fsdp" in kind.sharding.spec for kind in kinds), (leaf, kinds)


@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed")])
def test_gradients_of_bfloat16_products_are_summed_over_devices_in_float32(axes):
    mesh = sharding.build_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    w = jax.device_put(
        np.ones((16, 16), np.float32), sharding.weight_shardings(mesh, {"w": axes}, "parameters", 3)["w"]
    )
    x = np.ones((4, 100, 16), np.float32)
    x[0, 0] = 2.0  # the sum is 401, which bfloat16 does not have
    with jax.set_mesh(mesh):
        spec = sharding.activation_spec("batch", "sequence", axes[0])
        x = jax.device_put(jnp.asarray(x, jnp.bfloat16), spec)
        grads = jax.jit(jax.grad(lambda w: product(x, w, axes).astype(jnp.float32).sum()))(w)
    assert grads.dtype == jnp.float32
    np.testing.assert_array_equal(grads, 401.0)


@pytest.mark.parametrize(
    "mesh", ["data 8", "fsdp 4, tensor 2", "data 2, fsdp 2, tensor 2", "data 4, fsdp 2, zero 1"]
)
def test_rows_of_a_table_and_their_gradient_are_those_of_plain_indexing(mesh):
    config = MESHES[mesh]
    devices = sharding.build_mesh(config, jax.devices()[:8])
    rng = np.random.default_rng(0)
    table, ids = rng.normal(size=(12, 8)).astype(np.float32), rng.integers(0, 12, (8, 5)).astype(np.int32)
    ids[:, 0] = 3  # one row asked for by every device
    # Whole numbers: their sums are exact in any order.
    weights = rng.integers(-3, 4, (8, 5, 8)).astype(np.float32)
    held = sharding.weight_shardings(devices, {"t": ("vocab", "embed")}, "parameters", config.zero)["t"]
    given, batch = jax.device_put(table, held), jax.device_put(ids, sharding.batch_sharding(devices))

    def total(table):
        x = sharding.rows(table, batch, jnp.dtype(jnp.float32))
        return jnp.sum(x * sharding.constrain(jnp.asarray(weights), "batch", "sequence", "embed")), x

    with jax.set_mesh(devices):
        (_, x), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(given)
    np.testing.assert_array_equal(x, table[ids])
    wanted = np.zeros_like(table)
    np.add.at(wanted, ids, weights)
    np.testing.assert_array_equal(grads, wanted)
