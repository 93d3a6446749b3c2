"""One step: the loss is the mean over real tokens of the global batch, whatever the accumulation or mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack import sharding
from maxstack.data.batch import Batch
from maxstack.models import MoEConfig, llama
from maxstack.models.transformer import TransformerConfig
from maxstack.optim import OptimConfig
from maxstack.sharding import MeshConfig
from maxstack.train import losses, step
from maxstack.train import state as states
from maxstack.train.step import Health, SafetyConfig, abstract_batch, compiled, judge, train_step

ROWS, LENGTH, STEPS = 8, 16, 3
DENSE = llama(vocab_size=64, width=32, depth=2, heads=4, kv_heads=2, feed_forward=64, dtype="float32")
STACK = DENSE.stacks[0]
EXPERTS = MoEConfig(size=32, experts=4, experts_per_token=2, bias_rate=0.1)
MOE = dataclasses.replace(STACK.pattern[0], feed_forward=EXPERTS)
SPARSE = dataclasses.replace(DENSE, stacks=(dataclasses.replace(STACK, pattern=(MOE,)),))


def batches() -> list[Batch]:
    """Rows of very different numbers of real tokens, one of them all padding."""
    random = np.random.default_rng(0)
    result = []
    for _ in range(STEPS):
        tokens = random.integers(0, 64, (ROWS, LENGTH + 1)).astype(np.int32)
        real = np.arange(LENGTH) < random.integers(1, LENGTH, (ROWS, 1))
        real[3] = False
        positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), real.shape)
        segments, weights = real.astype(np.int32), real.astype(np.float32)
        result.append(Batch(tokens[:, :-1], tokens[:, 1:], segments, positions, weights))
    return result


def trained(
    config: TransformerConfig,
    mesh: MeshConfig,
    devices: int,
    micro: int = 1,
    optim: OptimConfig | None = None,
) -> tuple[list[float], list[float], states.TrainState]:
    optim = optim or OptimConfig(peak_lr=1e-2)
    where = sharding.build_mesh(mesh, jax.devices()[:devices])
    plan = states.layout(config, optim, where, zero=mesh.zero, steps=10)
    state = states.create(plan, config, 0)
    function = train_step(plan, losses.pretrain, optim, SafetyConfig(), 1e-3, 10)
    run = compiled(plan, function, abstract_batch(plan, micro, ROWS // micro, LENGTH), state)
    shape = sharding.batch_sharding(where, leading=1)
    found: list[Any] = []
    for batch in batches():
        split = (part.reshape(-1, micro, LENGTH).swapaxes(0, 1) for part in batch)
        state, metrics = run(state, Batch(*(jax.device_put(part, shape) for part in split)))
        found.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    return [loss for loss, _ in found], [norm for _, norm in found], state


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], list[float], states.TrainState]:
    return trained(DENSE, MeshConfig(), 1)


# Sums in another order: float32 rounding, grown a little by two updates.
CLOSE: dict[str, Any] = {"rtol": 5e-6}


@pytest.mark.parametrize("micro", [2, 4, 8])
def test_accumulation_equals_the_large_batch(alone, micro):
    found = trained(DENSE, MeshConfig(), 1, micro)
    np.testing.assert_allclose(found[0], alone[0], **CLOSE)
    np.testing.assert_allclose(found[1], alone[1], rtol=2e-5)


def test_mean_of_micro_batch_means_would_be_found(alone, monkeypatch):
    def mean_of_means(sums, tokens, micro_batches):
        return sums.nll / jnp.maximum(tokens / micro_batches, 1.0) / micro_batches * 1.01

    monkeypatch.setattr(step, "differentiable", mean_of_means)
    found = trained(DENSE, MeshConfig(), 1, 4)
    assert np.abs(np.asarray(found[1]) / np.asarray(alone[1]) - 1).max() > 1e-3


def test_padding_rows_and_tokens_change_nothing(alone, monkeypatch):
    garbage = []
    for batch in batches():
        tokens = np.where(batch.weights > 0, batch.tokens, 63).astype(np.int32)
        labels = np.where(batch.weights > 0, batch.labels, 1).astype(np.int32)
        garbage.append(batch._replace(tokens=tokens, labels=labels))
    monkeypatch.setitem(globals(), "batches", lambda: garbage)
    assert trained(DENSE, MeshConfig(), 1)[0] == alone[0]


def test_a_padded_row_that_counts_would_be_found(alone, monkeypatch):
    third = np.arange(ROWS)[:, None] == 3
    counted = [
        batch._replace(weights=np.where(third, 1, batch.weights).astype(np.float32)) for batch in batches()
    ]
    monkeypatch.setitem(globals(), "batches", lambda: counted)
    assert abs(trained(DENSE, MeshConfig(), 1)[0][0] - alone[0][0]) > 1e-3


MESHES = [
    MeshConfig(data=8, fsdp=1), MeshConfig(fsdp=8), MeshConfig(fsdp=8, zero=1), MeshConfig(fsdp=8, zero=2),
    MeshConfig(data=2, fsdp=4, zero=0), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=4, tensor=2, zero=1),
]  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh_gives_the_losses_of_one_device(alone, mesh):
    found = trained(DENSE, mesh, 8)
    np.testing.assert_allclose(found[0], alone[0], **CLOSE)
    np.testing.assert_allclose(found[1], alone[1], rtol=2e-5)


def test_experts_give_the_same_losses_and_balance_on_a_mesh():
    one, many = trained(SPARSE, MeshConfig(), 1), trained(SPARSE, MeshConfig(data=2, fsdp=2, tensor=2), 8)
    np.testing.assert_allclose(many[0], one[0], rtol=2e-5)
    for name, bias in one[2].buffers.items():
        np.testing.assert_array_equal(many[2].buffers[name], bias)
        assert np.abs(bias).max() > 0


@pytest.mark.parametrize("name", ["muon", "adafactor", "lion", "sgd"])
def test_every_optimizer_steps_on_a_mesh_as_on_one_device(name):
    optim = OptimConfig(name=name, peak_lr=1e-3, ema_decay=0.9)
    one = trained(DENSE, MeshConfig(), 1, optim=optim)
    many = trained(DENSE, MeshConfig(fsdp=4, tensor=2), 8, optim=optim)
    # Muon and Lion blow rounding up where a gradient is near zero.
    np.testing.assert_allclose(many[0], one[0], rtol=1e-4)
    assert one[2].ema.keys() == one[2].params.keys()


def test_non_finite_or_spiking_step_is_skipped_and_counted():
    healthy = Health(jnp.float32(1.0), jnp.int32(100), jnp.int32(0), jnp.int32(0))
    for loss, norm in ((jnp.nan, 1.0), (1.0, jnp.inf), (1.0, 11.0)):
        judged = judge(healthy, jnp.float32(loss), jnp.float32(norm), 10.0)
        assert (int(judged.skipped), int(judged.skipped_in_a_row), int(judged.accepted)) == (1, 1, 100)
        assert float(judged.norm_mean) == 1.0
    again = judge(judged, jnp.float32(1.0), jnp.float32(1.0), 10.0)
    assert (int(again.skipped), int(again.skipped_in_a_row), int(again.accepted)) == (1, 0, 101)
