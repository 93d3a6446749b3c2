"""Every optimizer against its float64 reference, and what all of them share: masks, state, settings refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxstack.config import UserError
from maxstack.optim import AdafactorConfig, MuonConfig, OptimConfig, ScheduleConfig, build, updates_applied
from tests.optim import references

AXES = {
    "table": ("vocab", "embed"), "blocks.q": ("layers", "embed", "heads", "head_dim"),
    "blocks.q_bias": ("layers", "heads", "head_dim"), "blocks.o": ("layers", "heads", "head_dim", "embed"),
    "blocks.norm": ("layers", "norm"), "blocks.router": ("layers", "embed", "expert"),
    "blocks.experts": ("layers", "expert", "embed", "mlp"), "w": ("embed", "mlp"),
}  # fmt: skip
SIZES = {"vocab": 24, "embed": 16, "layers": 3, "heads": 2, "head_dim": 8, "norm": 16, "expert": 2, "mlp": 20}
STEPS = 6
# float32 arithmetic over 6 updates of rate 0.01 on weights of size 1: a few units in the last place of 1, 6e-8 each.
# The planted bugs change weights by more than 1e-4.
CLOSE = {"rtol": 0, "atol": 2e-6}
CONSTANT = ScheduleConfig(kind="constant", warmup_steps=3)
RATES = [0.01 * min(1, (t + 1) / 3) for t in range(STEPS)]


def arrays(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        name: (scale * random.standard_normal([SIZES[a] for a in axes])).astype(np.float32)
        for name, axes in AXES.items()
    }


GRADS = [arrays(seed, 0.1) for seed in range(1, STEPS + 1)]


def run(config: OptimConfig) -> dict[str, np.ndarray]:
    optimizer = build(config, STEPS, AXES)
    params = jax.tree.map(jnp.asarray, arrays(0))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for grads in GRADS:
        updates, state = update(jax.tree.map(jnp.asarray, grads), state, params)
        params = optax.apply_updates(params, updates)
    assert int(updates_applied(state)) == STEPS
    return {name: np.asarray(leaf) for name, leaf in params.items()}


def optim(name: str, **settings) -> OptimConfig:
    return OptimConfig(name=name, peak_lr=0.01, weight_decay=0.1, schedule=CONSTANT, **settings)


def of(name: str) -> list[np.ndarray]:
    return [grads[name] for grads in GRADS]


@pytest.mark.parametrize("bug", ["", "coupled decay", "no bias correction", "eps inside the root"])
def test_adamw_equals_reference(bug):
    done = run(optim("adamw", beta1=0.9, beta2=0.95, eps=1e-3))
    want = references.adamw(
        arrays(0)["w"], of("w"), rates=RATES, b1=0.9, b2=0.95, eps=1e-3, decay=0.1, bug=bug
    )
    assert np.allclose(done["w"], want, **CLOSE) == (not bug)


@pytest.mark.parametrize("bug", ["", "betas swapped"])
def test_lion_equals_reference(bug):
    done = run(optim("lion", beta1=0.9, beta2=0.99))
    want = references.lion(arrays(0)["w"], of("w"), rates=RATES, b1=0.9, b2=0.99, decay=0.1, bug=bug)
    assert np.allclose(done["w"], want, **CLOSE) == (not bug)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("bug", ["", "damped gradient"])
def test_sgd_equals_reference(nesterov, bug):
    done = run(optim("sgd", momentum=0.9, nesterov=nesterov))
    settings = {"momentum": 0.9, "nesterov": nesterov, "decay": 0.1}
    want = references.sgd(arrays(0)["w"], of("w"), rates=RATES, **settings, bug=bug)
    assert np.allclose(done["w"], want, **CLOSE) == (not bug)


@pytest.mark.parametrize("bug", ["", "no look ahead"])
def test_muon_equals_reference(bug):
    done = run(optim("muon"))
    scale = 0.2 * math.sqrt(20)
    settings = {"momentum": 0.95, "nesterov": True, "scale": scale, "decay": 0.1, "bug": bug}
    want = references.muon(arrays(0)["w"], of("w"), rates=RATES, **settings)
    # The iteration amplifies rounding of small singular values by up to 3.4^5 = 480; measured 2e-6.
    assert np.allclose(done["w"], want, rtol=0, atol=2e-5) == (not bug)


@pytest.mark.parametrize("bug", ["", "constant decay", "not normalised"])
def test_adafactor_equals_reference(bug):
    done = run(optim("adafactor"))
    want = references.adafactor(
        arrays(0)["w"], of("w"), rates=RATES, exponent=0.8, clip=1.0, decay=0.1, bug=bug
    )
    assert np.allclose(done["w"], want, **CLOSE) == (not bug)


def test_muon_takes_several_dims_as_one_matrix():
    done = run(optim("muon"))
    settings = {
        "rates": RATES,
        "momentum": 0.95,
        "nesterov": True,
        "scale": 0.2 * math.sqrt(16),
        "decay": 0.1,
    }
    for layer in range(3):
        flat = [g[layer].reshape(16, 16) for g in of("blocks.q")]
        want = references.muon(arrays(0)["blocks.q"][layer].reshape(16, 16), flat, **settings)
        np.testing.assert_allclose(done["blocks.q"][layer].reshape(16, 16), want, rtol=0, atol=2e-5)
        flat = [g[layer].reshape(16, 16) for g in of("blocks.o")]
        want = references.muon(arrays(0)["blocks.o"][layer].reshape(16, 16), flat, **settings)
        np.testing.assert_allclose(done["blocks.o"][layer].reshape(16, 16), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["table", "blocks.q_bias", "blocks.norm", "blocks.router"])
def test_muon_gives_exempt_leaves_to_adam_at_their_own_rate(name):
    done = run(optim("muon", muon=MuonConfig(adam_lr_ratio=0.5)))
    settings = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "decay": 0.0}
    want = references.adamw(arrays(0)[name], of(name), rates=[0.5 * lr for lr in RATES], **settings)
    np.testing.assert_allclose(done[name], want, **CLOSE)


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lion", "sgd"])
def test_only_matrices_decay_and_embeddings_if_told(name, embeddings):
    settings = {"name": name, "peak_lr": 0.5, "schedule": ScheduleConfig(kind="constant", warmup_steps=0)}
    optimizer = build(OptimConfig(weight_decay=0.25, decay_embeddings=embeddings, **settings), 1, AXES)
    params = jax.tree.map(jnp.asarray, arrays(0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    decayed = {"blocks.q", "blocks.o", "blocks.experts", "w"} | ({"table"} if embeddings else set())
    for leaf, update in updates.items():
        want = -0.5 * 0.25 * params[leaf] if leaf in decayed else jnp.zeros_like(update)
        np.testing.assert_array_equal(update, want, err_msg=leaf)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lion", "sgd"])
def test_stacked_layers_and_experts_are_trained_as_their_slices(name):
    stacked = run(optim(name))
    axes = {"w": AXES["blocks.experts"][2:]}
    optimizer = build(optim(name), STEPS, axes)
    for layer, expert in [(0, 1), (2, 0)]:
        params = {"w": jnp.asarray(arrays(0)["blocks.experts"][layer, expert])}
        state = optimizer.init(params)
        for grads in of("blocks.experts"):
            updates, state = optimizer.update({"w": jnp.asarray(grads[layer, expert])}, state, params)
            params = optax.apply_updates(params, updates)
        # The same float32 operations, compiled in other loops; Muon amplifies rounding as above.
        np.testing.assert_allclose(
            stacked["blocks.experts"][layer, expert], np.asarray(params["w"]), rtol=0, atol=2e-5
        )


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lion", "sgd"])
def test_moments_are_float32_for_bfloat16_weights_and_gradients(name):
    optimizer = build(optim(name), STEPS, AXES)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), arrays(0))
    state = optimizer.init(params)
    updates, state = optimizer.update(params, state, params)
    kinds = {leaf.dtype for leaf in jax.tree.leaves((updates, state))}
    assert kinds <= {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lion", "sgd"])
def test_bfloat16_first_moments_halve_their_memory_and_stay_near(name):
    momentum = {"adafactor": AdafactorConfig(momentum=0.9)} if name == "adafactor" else {}
    wide, narrow = run(optim(name, **momentum)), run(optim(name, **momentum, moment_dtype="bfloat16"))
    state = build(optim(name, **momentum, moment_dtype="bfloat16"), STEPS, AXES).init(arrays_on_device())
    halved = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.bfloat16)
    assert halved == sum(math.prod(leaf.shape) for leaf in arrays(0).values())
    # A first moment rounded to 8 bits moves an update of size ≤ 0.01 by about 1/256 of it, six times; the sign that
    # Lion takes may flip where it is about 0, which moves the weight by twice the rate.
    bound = {"lion": 2 * sum(RATES), "muon": 5e-3}.get(name, 1e-3)
    assert max(np.abs(wide[leaf] - narrow[leaf]).max() for leaf in wide) < bound


def arrays_on_device() -> dict[str, jax.Array]:
    return jax.tree.map(jnp.asarray, arrays(0))


def test_weights_without_axes_are_refused_by_name():
    optimizer = build(optim("adamw"), STEPS, {"a": ("norm",)})
    with pytest.raises(ValueError, match="weight b has no logical axes"):
        optimizer.init({"b": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"weight a of shape \(3, 4\) has 1 logical axes"):
        optimizer.init({"a": jnp.zeros((3, 4))})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("peak_lr", 0.0), ("peak_lr", -1.0), ("peak_lr", math.nan), ("beta1", 1.0), ("beta2", -0.1), ("eps", 0.0),
        ("momentum", 1.5), ("weight_decay", -0.1), ("clip_norm", math.inf), ("ema_decay", 1.0),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_field_and_number(setting, value):
    with pytest.raises(UserError, match=rf"optim\.{setting} .*{value}"):
        OptimConfig(**{setting: value})


@pytest.mark.parametrize(
    ("part", "setting", "value"),
    [
        (MuonConfig, "momentum", 1.0), (MuonConfig, "ns_steps", 0), (MuonConfig, "update_rms", -0.2),
        (AdafactorConfig, "decay_exponent", 0.0), (AdafactorConfig, "clip_threshold", -1.0),
        (AdafactorConfig, "momentum", 1.0),
    ],
)  # fmt: skip
def test_impossible_settings_of_one_optimizer_are_refused(part, setting, value):
    with pytest.raises(UserError, match=rf"optim\.\w+\.{setting} .*{value}"):
        part(**{setting: value})
