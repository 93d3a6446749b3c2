"""One step: the loss is the mean over real tokens of the global batch, whatever the accumulation or mesh."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack import sharding
from maxstack.config import UserError
from maxstack.data.batch import Batch
from maxstack.models import FeedForwardConfig, MoEConfig, llama
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


def with_experts(**changes: Any) -> TransformerConfig:
    """SPARSE with other experts."""
    block = dataclasses.replace(MOE, feed_forward=dataclasses.replace(EXPERTS, **changes))
    return dataclasses.replace(SPARSE, stacks=(dataclasses.replace(STACK, pattern=(block,)),))


def ready(
    config: TransformerConfig, mesh: MeshConfig, devices: int, micro: int, optim: OptimConfig
) -> tuple[states.TrainState, Callable[[states.TrainState, Batch], tuple[states.TrainState, step.Metrics]]]:
    """The state before the first step, and the compiled step on a batch [row, t] of the host."""
    where = sharding.build_mesh(mesh, jax.devices()[:devices])
    plan = states.layout(config, optim, where, zero=mesh.zero, steps=10)
    state = states.create(plan, config, 0)
    function = train_step(plan, losses.pretrain, optim, SafetyConfig(), 1e-3, 10)
    run = compiled(plan, function, abstract_batch(plan, micro, ROWS // micro, LENGTH), state)
    shape = sharding.batch_sharding(where, leading=1)

    def advance(state: states.TrainState, batch: Batch) -> tuple[states.TrainState, step.Metrics]:
        split = (part.reshape(-1, micro, LENGTH).swapaxes(0, 1) for part in batch)
        return run(state, Batch(*(jax.device_put(part, shape) for part in split)))

    return state, advance


def trained(
    config: TransformerConfig,
    mesh: MeshConfig,
    devices: int,
    micro: int = 1,
    optim: OptimConfig | None = None,
    data: list[Batch] | None = None,
) -> tuple[list[float], list[float], states.TrainState]:
    state, advance = ready(config, mesh, devices, micro, optim or OptimConfig(peak_lr=1e-2))
    found: list[Any] = []
    for batch in data or batches():
        state, metrics = advance(state, batch)
        found.append((float(metrics["loss"]), float(metrics["gradient_norm"])))
    return [loss for loss, _ in found], [norm for _, norm in found], state


@pytest.fixture(scope="module")
def sparse() -> tuple[list[float], list[float], states.TrainState]:
    return trained(SPARSE, MeshConfig(), 1)


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], list[float], states.TrainState]:
    return trained(DENSE, MeshConfig(), 1)


# Sums in another order: float32 rounding, grown a little by two updates.
CLOSE: dict[str, Any] = {"rtol": 5e-6}


@pytest.mark.parametrize("micro", [2, 8, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulation_equals_the_large_batch(alone, micro):
    found = trained(DENSE, MeshConfig(), 1, micro)
    np.testing.assert_allclose(found[0], alone[0], **CLOSE)
    np.testing.assert_allclose(found[1], alone[1], rtol=2e-5)


def test_mean_of_micro_batch_means_would_be_found(alone, monkeypatch):
    def mean_of_means(sums, batch, tokens, real):
        return losses.share_of_step(sums, batch, jnp.maximum(batch.weights.sum(), 1.0) * 4, real)

    monkeypatch.setattr(step, "share_of_step", mean_of_means)
    found = trained(DENSE, MeshConfig(), 1, 4)
    assert abs(found[0][0] / alone[0][0] - 1) > 1e-4
    assert np.abs(np.asarray(found[1]) / np.asarray(alone[1]) - 1).max() > 1e-3


ROUTER_Z = with_experts(auxiliary_loss=0.0, router_z_loss=0.1)


@pytest.fixture(scope="module")
def router_z() -> tuple[list[float], list[float], states.TrainState]:
    return trained(ROUTER_Z, MeshConfig(), 1)


@pytest.mark.parametrize("micro", [8, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulation_does_not_change_the_router_z_loss(router_z, micro):
    """With 8, one micro-batch is padding alone."""
    found = trained(ROUTER_Z, MeshConfig(), 1, micro)
    np.testing.assert_allclose(found[0], router_z[0], **CLOSE)
    np.testing.assert_allclose(found[1], router_z[1], rtol=2e-5)


def test_micro_batches_of_equal_weight_would_be_found(router_z, monkeypatch):
    def equal(sums, batch, tokens, real):
        return losses.share_of_step(sums, batch, tokens, real)._replace(per_batch=sums.per_batch / 4)

    monkeypatch.setattr(step, "share_of_step", equal)
    assert abs(trained(ROUTER_Z, MeshConfig(), 1, 4)[0][0] / router_z[0][0] - 1) > 1e-4


def test_accumulation_changes_the_auxiliary_loss_within_its_bound(sparse):
    found = trained(SPARSE, MeshConfig(), 1, 4)
    # An expert's fraction is at most 1 / experts_per_token and the probabilities sum to one, so the loss of a layer is
    # 0 to auxiliary_loss * experts / experts_per_token = 0.02, for a step as for each of its micro-batches.
    bound = STACK.repeats * EXPERTS.auxiliary_loss * EXPERTS.experts / EXPERTS.experts_per_token
    assert 0 < abs(found[0][0] - sparse[0][0]) < bound


def test_shares_of_micro_batches_are_their_real_tokens():
    """Real tokens are those a model sees, also where their loss does not count; of padding there is no share."""
    batch = batches()[0]
    batch = batch._replace(weights=batch.weights * 0.5)
    real = losses.real_tokens(batch)
    rows = [jax.tree.map(lambda part, row=row: part[row], batch) for row in range(ROWS)]
    sums = losses.LossSums(jnp.zeros(()), per_batch=2.0)
    shares = [float(losses.share_of_step(sums, row, jnp.float32(1.0), real).per_batch) for row in rows]
    np.testing.assert_allclose(shares, 2 * (batch.segment_ids > 0).sum(1) / real, rtol=1e-6)
    assert shares[3] == 0.0


def garbage_in_padding() -> list[Batch]:
    result = []
    for batch in batches():
        tokens = np.where(batch.weights > 0, batch.tokens, 63).astype(np.int32)
        labels = np.where(batch.weights > 0, batch.labels, 1).astype(np.int32)
        result.append(batch._replace(tokens=tokens, labels=labels))
    return result


def test_padding_rows_and_tokens_change_nothing(alone):
    assert trained(DENSE, MeshConfig(), 1, data=garbage_in_padding())[0] == alone[0]


def test_padding_that_counts_would_be_found(monkeypatch):
    def unmasked(model, batch, z_loss):
        return pretrain(model, batch._replace(weights=jnp.ones_like(batch.weights)), z_loss)

    pretrain = losses.pretrain
    monkeypatch.setattr(losses, "pretrain", unmasked)
    clean, garbage = (trained(DENSE, MeshConfig(), 1, data=data)[0] for data in (None, garbage_in_padding()))
    assert abs(garbage[0] - clean[0]) > 1e-3


MESHES = [
    MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=4, tensor=2, zero=1),
    *(
        pytest.param(mesh, marks=pytest.mark.slow)
        for mesh in (
            MeshConfig(data=8, fsdp=1), MeshConfig(data=2, fsdp=4, zero=0),
            MeshConfig(fsdp=8, zero=1), MeshConfig(fsdp=8, zero=2),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh_gives_the_losses_of_one_device(alone, mesh):
    found = trained(DENSE, mesh, 8)
    np.testing.assert_allclose(found[0], alone[0], **CLOSE)
    np.testing.assert_allclose(found[1], alone[1], rtol=2e-5)


def test_experts_give_the_same_losses_and_balance_on_a_mesh(sparse):
    many = trained(SPARSE, MeshConfig(data=2, fsdp=2, tensor=2), 8)
    np.testing.assert_allclose(many[0], sparse[0], rtol=2e-5)
    for name, bias in sparse[2].buffers.items():
        np.testing.assert_array_equal(many[2].buffers[name], bias)
        assert np.abs(bias).max() > 0


@pytest.mark.parametrize(
    "name", ["muon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adafactor", "lion", "sgd"))]
)
def test_every_optimizer_steps_on_a_mesh_as_on_one_device(name):
    optim = OptimConfig(name=name, peak_lr=1e-3, ema_decay=0.9)
    one = trained(DENSE, MeshConfig(), 1, optim=optim)
    many = trained(DENSE, MeshConfig(fsdp=4, tensor=2), 8, optim=optim)
    # Muon and Lion blow rounding up where a gradient is near zero.
    np.testing.assert_allclose(many[0], one[0], rtol=1e-4)
    assert one[2].ema.keys() == one[2].params.keys()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RatedConfig(FeedForwardConfig):
    """A feed-forward of one's own: a rate, but no balancing bias."""

    bias_rate: float = 0.1


def test_load_reported_by_a_feed_forward_without_a_balancing_bias_is_left_alone():
    blocks = [
        dataclasses.replace(MOE, feed_forward=config)
        for config in (EXPERTS, FeedForwardConfig(size=64), RatedConfig(size=64))
    ]
    config = dataclasses.replace(DENSE, stacks=(dataclasses.replace(STACK, pattern=tuple(blocks)),))
    where = sharding.build_mesh(MeshConfig(), jax.devices()[:1])
    plan = states.layout(config, OptimConfig(), where, zero=0, steps=1)
    load = jnp.asarray([[3.0, 1.0, 2.0, 2.0]] * STACK.repeats)
    (name,) = plan.buffer_axes
    moved = step.rebalanced(plan, {name: jnp.zeros_like(load)}, {"0.0": load, "0.1": load, "0.2": load})
    assert moved.keys() == {name}
    np.testing.assert_allclose(moved[name], [[-0.1, 0.1, 0.0, 0.0]] * STACK.repeats)


def test_skipped_step_changes_nothing_but_the_count():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    state, advance = ready(SPARSE, mesh, 8, 1, OptimConfig(ema_decay=0.9))
    good, bad, _ = batches()
    bad.weights[0, 0] = np.nan
    state, _ = advance(state, good)
    kept = ("params", "opt_state", "ema", "buffers")
    before = {name: jax.tree.map(np.array, getattr(state, name)) for name in kept}
    state, metrics = advance(state, bad)
    assert np.isnan(metrics["loss"])
    assert (int(state.step), int(state.health.accepted), int(state.health.skipped)) == (2, 1, 1)
    for name in kept:
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), before[name])
    state, _ = advance(state, good)
    for name in kept:  # and an accepted step changes each of them
        now = jax.tree.leaves(getattr(state, name))
        assert any(not np.array_equal(a, b) for a, b in zip(now, jax.tree.leaves(before[name]), strict=True))


@pytest.mark.parametrize(
    "wrong",
    [{"skip_limit": 0}, {"spike_factor": -1.0}, {"spike_factor": math.inf}, {"spike_factor": math.nan}],
    ids=str,
)
def test_safety_that_makes_no_sense_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(UserError, match=rf"safety\.{name} is {value}: it must be"):
        SafetyConfig(**wrong)
    SafetyConfig(skip_limit=1, spike_factor=0.0)


def test_non_finite_or_spiking_step_is_skipped_and_counted():
    healthy = Health(jnp.float32(1.0), jnp.int32(100), jnp.int32(0), jnp.int32(0))
    for loss, norm in ((jnp.nan, 1.0), (1.0, jnp.inf), (1.0, 11.0)):
        judged = judge(healthy, jnp.float32(loss), jnp.float32(norm), 10.0)
        assert (int(judged.skipped), int(judged.skipped_in_a_row), int(judged.accepted)) == (1, 1, 100)
        assert float(judged.norm_mean) == 1.0
    again = judge(judged, jnp.float32(1.0), jnp.float32(1.0), 10.0)
    assert (int(again.skipped), int(again.skipped_in_a_row), int(again.accepted)) == (1, 0, 101)
