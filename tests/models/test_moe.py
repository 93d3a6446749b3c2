"""Experts: nothing is dropped, the load is balanced the right way, padding does not count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.config import UserError
from maxstack.models import MoE, MoEConfig, tree

B, T, D = 2, 10, 16
BASE = MoEConfig(size=12, experts=6, experts_per_token=2)
VARIANTS = {
    "softmax": BASE,
    "sigmoid": dataclasses.replace(BASE, scoring="sigmoid", routed_scale=2.5),
    "not normalised": dataclasses.replace(BASE, normalize=False, experts_per_token=3),
    "shared": dataclasses.replace(BASE, shared_size=8, activation="gelu_tanh"),
    "one of one": dataclasses.replace(BASE, experts=1, experts_per_token=1),
    "gated shared": dataclasses.replace(BASE, shared_size=8, shared_gate=True),
    "offsets": dataclasses.replace(
        BASE, bias=True, router_bias=True, activation="quick_gelu", clamp=0.6, up_offset=1.0
    ),
    "best groups": dataclasses.replace(
        BASE, groups=3, groups_per_token=2, experts_per_token=3, normalize=False
    ),
    "pairs of groups": dataclasses.replace(BASE, groups=2, group_best=2, scoring="sigmoid", routed_scale=2.5),
}


def layer(config: MoEConfig, seed: int = 0) -> MoE:
    abstract = tree.abstract(lambda: config.build(jax.random.key(0), D, 1.0))
    rng = np.random.default_rng(seed)
    arrays = {
        name: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32)
        for name, leaf in tree.leaves(abstract).items()
    }
    return tree.rebuild(abstract, arrays)


def inputs(seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((B, T, D)), jnp.float32)


def dense(moe: MoE, x: jax.Array) -> np.ndarray:
    """Each token through each of its experts, one by one, in float64."""
    c, w = moe.config, {k: np.asarray(v, np.float64) for k, v in tree.leaves(moe).items()}
    act = {
        "silu": lambda z: z / (1 + np.exp(-z)),
        "quick_gelu": lambda z: z / (1 + np.exp(-1.702 * z)),
        "gelu_tanh": lambda z: 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
    }[c.activation]
    y = np.zeros((B, T, D))
    for b in range(B):
        for t in range(T):
            token = np.asarray(x[b, t], np.float64)
            logits = token @ w["router"] + (w["router_b"] if c.router_bias else 0.0)
            scores = (
                1 / (1 + np.exp(-logits)) if c.scoring == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
            )
            biased = (scores + w["balance"]).reshape(c.groups, -1)
            of_group = np.sort(biased, -1)[:, -c.group_best :].sum(-1)
            biased[np.argsort(-of_group)[c.groups_per_token :]] = -np.inf
            chosen = np.argsort(-biased.reshape(-1))[: c.experts_per_token]
            weights = scores[chosen] / (scores[chosen].sum() if c.normalize else 1.0) * c.routed_scale
            for e, weight in zip(chosen, weights, strict=True):
                gate, up, down = (w[f"{p}_b"][e] if c.bias else 0.0 for p in ("gate", "up", "down"))
                gate, up = gate + token @ w["gate"][e], up + token @ w["up"][e]
                if c.clamp:
                    gate, up = np.minimum(gate, c.clamp), np.clip(up, -c.clamp, c.clamp)
                y[b, t] += weight * (act(gate) * (up + c.up_offset) @ w["down"][e] + down)
            if c.shared_size:
                inner = act(token @ w["shared.gate.w"]) * (token @ w["shared.up.w"])
                share = 1 / (1 + np.exp(-token @ w["shared_gate"])) if c.shared_gate else 1.0
                y[b, t] += share * inner @ w["shared.down.w"]
    return y


@pytest.mark.parametrize("name", VARIANTS)
def test_grouped_products_equal_a_loop_over_tokens_and_experts(name):
    moe, x = layer(VARIANTS[name]), inputs()
    y, _ = jax.jit(lambda moe, x: moe(x))(moe, x)
    # Float32 against float64, sums of up to 48 terms of size 1.
    np.testing.assert_allclose(y, dense(moe, x), rtol=2e-5, atol=2e-5)


def test_no_token_is_dropped_when_all_choose_the_same_expert():
    moe, x = layer(BASE), inputs()
    arrays = tree.leaves(moe)
    arrays["balance"] = jnp.asarray([0.0, 0, 0, 100, 90, 0])
    moe = tree.rebuild(moe, arrays)
    y, aux = moe(x)
    assert aux["expert_load"].tolist() == [0, 0, 0, B * T, B * T, 0]
    np.testing.assert_allclose(y, dense(moe, x), rtol=2e-5, atol=2e-5)


def test_padded_tokens_count_neither_in_the_load_nor_in_the_losses():
    moe, x = layer(dataclasses.replace(BASE, router_z_loss=0.1)), inputs()
    real = jnp.arange(T) < jnp.asarray([[4], [7]])
    _, aux = moe(x, real)
    assert aux["expert_load"].sum() == (4 + 7) * BASE.experts_per_token
    _, other = moe(jnp.where(real[..., None], x, 5.0), real)
    assert aux["moe_loss"] == other["moe_loss"]
    assert np.array_equal(aux["expert_load"], other["expert_load"])
    _, counted = moe(jnp.where(real[..., None], x, 5.0))
    assert aux["moe_loss"] != counted["moe_loss"]


def test_a_row_of_padding_alone_has_no_loss():
    moe = layer(BASE)
    _, aux = moe(inputs(), jnp.zeros((B, T), bool))
    assert aux["moe_loss"] == 0.0
    assert aux["expert_load"].sum() == 0.0


def test_the_auxiliary_loss_is_its_weight_when_balanced_and_more_when_not():
    moe, x = layer(BASE), inputs()
    arrays = tree.leaves(moe) | {"router": jnp.zeros((D, BASE.experts))}
    _, aux = tree.rebuild(moe, arrays)(x)
    # Equal probabilities: experts * sum(fraction * 1 / experts) = 1, whatever the fractions are.
    np.testing.assert_allclose(aux["moe_loss"], BASE.auxiliary_loss, rtol=1e-6)
    one_sided = np.zeros((D, BASE.experts), np.float32)
    one_sided[:, 2] = 5.0
    _, aux = tree.rebuild(moe, arrays | {"router": jnp.asarray(one_sided)})(jnp.abs(x))
    assert aux["moe_loss"] > 2 * BASE.auxiliary_loss


def test_the_balancing_bias_draws_tokens_and_changes_no_weight():
    moe, x = layer(dataclasses.replace(BASE, scoring="sigmoid")), inputs()
    arrays = tree.leaves(moe) | {"balance": jnp.zeros(BASE.experts)}
    _, before = tree.rebuild(moe, arrays)(x)
    rarest = int(jnp.argmin(before["expert_load"]))
    _, after = tree.rebuild(moe, arrays | {"balance": jnp.zeros(BASE.experts).at[rarest].set(0.2)})(x)
    assert after["expert_load"][rarest] > before["expert_load"][rarest]
    # A bias that changes nobody's choice changes nothing at all: it is no part of the weights.
    raised, _ = tree.rebuild(moe, arrays | {"balance": jnp.full(BASE.experts, 3.0)})(x)
    plain, _ = tree.rebuild(moe, arrays)(x)
    assert np.array_equal(raised, plain)


def test_steps_of_the_bias_rate_even_out_the_load():
    config = dataclasses.replace(BASE, scoring="sigmoid", bias_rate=0.05)
    moe, x = layer(config), inputs() + 1.0  # a common direction that some experts' routers favour
    arrays = tree.leaves(moe) | {"balance": jnp.zeros(config.experts)}
    load = jax.jit(lambda arrays: tree.rebuild(moe, arrays)(x)[1]["expert_load"])
    first = load(arrays)
    for _ in range(40):  # the rule of the training step: a fixed step towards the mean
        now = load(arrays)
        arrays["balance"] += config.bias_rate * jnp.sign(now.mean() - now)
    assert load(arrays).std() < 0.4 * first.std(), (first, load(arrays))


def test_gradients_reach_the_router_and_all_chosen_experts_and_not_the_bias():
    moe, x = layer(dataclasses.replace(BASE, scoring="sigmoid")), inputs()

    def loss(arrays: dict[str, jax.Array]) -> jax.Array:
        y, aux = tree.rebuild(moe, arrays)(x)
        return jnp.sum(jnp.sin(y)) + aux["moe_loss"]

    grads = jax.grad(loss)(tree.leaves(moe))
    _, aux = moe(x)
    used = np.asarray(aux["expert_load"]) > 0
    assert np.abs(grads["router"]).max() > 1e-3
    assert np.array_equal(np.abs(grads["down"]).max((1, 2)) > 0, used)
    assert np.abs(grads["balance"]).max() == 0.0


def test_routing_is_float32_under_bfloat16_compute():
    # Scores that differ by less than bfloat16 resolves still decide: 1 + 2^-10 of the first expert's logit.
    moe = layer(dataclasses.replace(BASE, experts_per_token=1))
    router = jnp.ones((D, BASE.experts)).at[:, 4].set(1 + 2**-10)
    moe = tree.rebuild(moe, tree.leaves(moe) | {"router": router, "balance": jnp.zeros(BASE.experts)})
    _, aux = moe(jnp.ones((B, T, D), jnp.bfloat16))
    assert aux["expert_load"].tolist() == [0, 0, 0, 0, B * T, 0]


REFUSED = {
    "must be a multiple of moe.groups 4": {"groups": 4},
    "at least 2 are needed for 3 experts a token": {"groups": 3, "experts_per_token": 3},
    "groups_per_token is 3": {"groups": 2, "groups_per_token": 3},
    "a group has 2 experts": {"groups": 3, "group_best": 3},
    "moe.clamp is 0.0": {"clamp": 0.0},
    "needs a shared expert": {"shared_gate": True},
}


@pytest.mark.parametrize("told", REFUSED)
def test_settings_that_cannot_work_are_refused_with_the_numbers(told):
    with pytest.raises(UserError, match=told):
        dataclasses.replace(BASE, **REFUSED[told])


def test_offsets_of_experts_are_added_and_their_gradients_summed_in_float32():
    # 400 tokens of the same expert: a sum of ones in bfloat16 ends at 256.
    moe = layer(dataclasses.replace(BASE, experts=1, experts_per_token=1, bias=True))
    arrays = {name: jnp.zeros_like(array) for name, array in tree.leaves(moe).items()} | {
        "up_b": jnp.ones((1, 12))
    }
    arrays |= {"gate_b": jnp.full((1, 12), 40.0), "down": jnp.ones((1, 12, D)) / D}
    x = jnp.zeros((4, 100, D), jnp.bfloat16)

    def loss(arrays: dict[str, jax.Array]) -> jax.Array:
        return tree.rebuild(moe, arrays)(x)[0].astype(jnp.float32).sum()

    grads = jax.grad(loss)(arrays)
    np.testing.assert_array_equal(grads["up_b"], 400 * 40.0)
    np.testing.assert_array_equal(grads["down_b"], 400.0)
