"""Logits equal those of the reference implementations, on tiny random models of each architecture.

The golden files are made by tests/goldens/make_models.py, which says how.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxstack.models import (
    AttentionConfig,
    BlockConfig,
    FeedForwardConfig,
    MLAConfig,
    MoEConfig,
    RMSNormConfig,
    RopeConfig,
    StackConfig,
    TransformerConfig,
    tree,
)
from maxstack.models.attention import Context

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
PLAIN = RopeConfig(theta=100.0)
WEIGHTS = dict[str, np.ndarray]
# Of logits of size 1, absolute and relative. 1e-5 is the most that was measured; a
# planted bug moves them by 1e-2 or more.
TOLERANCE = 5e-5


def transformer(*stacks: StackConfig, eps: float = 1e-6, **fields) -> TransformerConfig:
    fields = {"tie_embeddings": False, "final_norm": RMSNormConfig(eps=eps)} | fields
    return TransformerConfig(vocab_size=64, width=16, stacks=stacks, dtype="float32", **fields)


def attention(**fields) -> AttentionConfig:
    return AttentionConfig(**{"heads": 4, "kv_heads": 2, "head_size": 8, "rope": PLAIN} | fields)


def dense(attention: AttentionConfig, *, eps: float = 1e-6, **fields) -> BlockConfig:
    feed_forward = FeedForwardConfig(size=24)
    fields = {"norm": RMSNormConfig(eps=eps), "feed_forward": feed_forward} | fields
    return BlockConfig(attention=attention, **fields)


def alike(block: BlockConfig) -> StackConfig:
    return StackConfig(pattern=(block,), repeats=2)


def gemma2() -> TransformerConfig:
    norm = RMSNormConfig(unit_offset=True)
    fields = {
        "norm": norm,
        "post_norm": True,
        "feed_forward": FeedForwardConfig(size=24, activation="gelu_tanh"),
    }
    local = dense(attention(window=8, softcap=2.0, scale=12**-0.5), **fields)
    full = dense(attention(softcap=2.0, scale=12**-0.5), **fields)
    return transformer(
        StackConfig(pattern=(local, full), repeats=2),
        final_norm=norm,
        tie_embeddings=True,
        embedding_scale=4.0,
        logit_softcap=5.0,
    )


def olmo2() -> TransformerConfig:
    eps = 1e-5
    heads = attention(head_size=4, qk_norm=RMSNormConfig(eps=eps), qk_norm_over_heads=True)
    return transformer(alike(dense(heads, eps=eps, pre_norm=False, post_norm=True)), eps=eps)


def mixtral() -> TransformerConfig:
    moe = MoEConfig(size=24, experts=4, experts_per_token=2)
    return transformer(alike(dense(attention(), eps=1e-5, feed_forward=moe)), eps=1e-5)


def deepseek_v3() -> TransformerConfig:
    latent = MLAConfig(heads=4, kv_rank=12, q_rank=10, rope_size=8, nope_size=6, v_size=10, rope=PLAIN)
    moe = MoEConfig(
        size=12, experts=6, experts_per_token=2, shared_size=24, scoring="sigmoid", routed_scale=2.5
    )
    return transformer(
        StackConfig(pattern=(dense(latent),), repeats=1),
        StackConfig(pattern=(dense(latent, feed_forward=moe),), repeats=1),
    )


SCALED = {
    "llama3": RopeConfig(
        theta=100.0, scaling="llama3", factor=4.0, original_length=32, high_frequency_factor=3.0
    ),
    "linear": RopeConfig(theta=100.0, scaling="linear", factor=4.0),
    "dynamic": RopeConfig(theta=100.0, scaling="dynamic", factor=2.0, original_length=32),
    "yarn": RopeConfig(theta=100.0, scaling="yarn", factor=4.0, beta_fast=4.0, original_length=32),
}
CONFIGS = {
    **{f"llama_{name}": transformer(alike(dense(attention(rope=rope)))) for name, rope in SCALED.items()},
    "qwen2": transformer(alike(dense(attention(qkv_bias=True))), tie_embeddings=True),
    "qwen3": transformer(alike(dense(attention(qk_norm=RMSNormConfig())))),
    "gemma2": gemma2(),
    "olmo2": olmo2(),
    "mixtral": mixtral(),
    "deepseek_v3": deepseek_v3(),
}


def heads(w: np.ndarray, count: int) -> np.ndarray:
    """[out, in] with heads stacked in out, as [in, heads, size]; an offset as [heads, size]."""
    if w.ndim == 1:
        return w.reshape(count, -1)
    return w.T.reshape(w.shape[1], count, -1)


def way_out(w: np.ndarray, count: int) -> np.ndarray:
    """[out, in] with heads stacked in in, as [heads, size, out]."""
    return w.T.reshape(count, -1, w.shape[0])


def halves(w: np.ndarray, start: int) -> np.ndarray:
    """The last axis from `start` on holds rotary pairs (0, 1), (2, 3), …: put first members before second ones."""
    rest = w[..., start:]
    return np.concatenate([w[..., :start], rest[..., 0::2], rest[..., 1::2]], -1)


def grouped_attention(w: WEIGHTS, config: AttentionConfig) -> WEIGHTS:
    counts = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
    result = {f"{x}.w": heads(w[f"self_attn.{x}_proj.weight"], n) for x, n in counts.items()}
    if config.qkv_bias:
        result |= {f"{x}.b": heads(w[f"self_attn.{x}_proj.bias"], n) for x, n in counts.items()}
    if config.qk_norm:
        kind = "norm.norm.scale" if config.qk_norm_over_heads else "norm.scale"
        result |= {f"{x}_{kind}": w[f"self_attn.{x}_norm.weight"] for x in "qk"}
    if config.sinks:
        result["sinks"] = w["self_attn.sinks"]
    if config.output_bias:
        result["o.b"] = w["self_attn.o_proj.bias"]
    return result | {"o.w": way_out(w["self_attn.o_proj.weight"], config.heads)}


def latent_attention(w: WEIGHTS, config: MLAConfig) -> WEIGHTS:
    down = w["self_attn.kv_a_proj_with_mqa.weight"].T
    up = heads(w["self_attn.kv_b_proj.weight"], config.heads)
    return {
        "q_down.w": w["self_attn.q_a_proj.weight"].T,
        "q_norm.scale": w["self_attn.q_a_layernorm.weight"],
        "q_up.w": halves(heads(w["self_attn.q_b_proj.weight"], config.heads), config.nope_size),
        "kv_down.w": down[:, : config.kv_rank],
        "kv_norm.scale": w["self_attn.kv_a_layernorm.weight"],
        "k_rope.w": halves(down[:, config.kv_rank :], 0),
        "k_up.w": up[..., : config.nope_size],
        "v_up.w": up[..., config.nope_size :],
        "o.w": way_out(w["self_attn.o_proj.weight"], config.heads),
    }


def feed_forward(w: WEIGHTS, config: FeedForwardConfig | MoEConfig) -> WEIGHTS:
    if isinstance(config, FeedForwardConfig):
        return {f"{x}.w": w[f"mlp.{x}_proj.weight"].T for x in ("gate", "up", "down")}
    both = w["mlp.experts.gate_up_proj"].swapaxes(1, 2)
    result = {
        "router": w["mlp.gate.weight"].T,
        "balance": w.get("mlp.gate.e_score_correction_bias", np.zeros(config.experts)),
        "gate": both[..., : config.size],
        "up": both[..., config.size :],
        "down": w["mlp.experts.down_proj"].swapaxes(1, 2),
    }
    if config.shared_size:
        result |= {
            f"shared.{x}.w": w[f"mlp.shared_experts.{x}_proj.weight"].T for x in ("gate", "up", "down")
        }
    return result


def layer(w: WEIGHTS, config: BlockConfig) -> WEIGHTS:
    """One layer's weights under our names."""
    attend = latent_attention if isinstance(config.attention, MLAConfig) else grouped_attention
    result = {f"attention.{name}": x for name, x in attend(w, config.attention).items()}
    result |= {f"feed_forward.{name}": x for name, x in feed_forward(w, config.feed_forward).items()}
    norms = {"attention_norm": "input", "feed_forward_norm": "post_attention"} if config.pre_norm else {}
    if config.post_norm:
        norms["feed_forward_norm"] = "pre_feedforward"
        norms |= {"attention_post_norm": "post_attention", "feed_forward_post_norm": "post_feedforward"}
        norms = norms if config.pre_norm else {k: v for k, v in norms.items() if "post_norm" in k}
    return result | {f"{ours}.scale": w[f"{theirs}_layernorm.weight"] for ours, theirs in norms.items()}


def our_weights(config: TransformerConfig, w: WEIGHTS) -> WEIGHTS:
    """All weights under our names, layers stacked."""
    result = {"embedding.table": w["model.embed_tokens.weight"], "final_norm.scale": w["model.norm.weight"]}
    if not config.tie_embeddings:
        result["head"] = w["lm_head.weight"].T
    first = 0
    for i, stack in enumerate(config.stacks):
        period = len(stack.pattern)
        for j, block in enumerate(stack.pattern):
            repeats = []
            for index in range(first + j, first + period * stack.repeats, period):
                prefix = f"model.layers.{index}."
                own = {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}
                repeats.append(layer(own, block))
            for name in repeats[0]:
                result[f"stacks.{i}.layers.{j}.{name}"] = np.stack([one[name] for one in repeats])
        first += period * stack.repeats
    return result


def read(name: str) -> tuple[WEIGHTS, dict[str, np.ndarray]]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    weights = {k.removeprefix("w:"): v.astype(np.float32) for k, v in arrays.items() if k.startswith("w:")}
    return weights, {k: v for k, v in arrays.items() if not k.startswith("w:")}


def logits_of(config: TransformerConfig, weights: WEIGHTS, tokens: np.ndarray) -> np.ndarray:
    """Logits of the model of `config` with weights under our names."""
    abstract = tree.abstract(lambda: config.build(jax.random.key(0)))
    arrays = {k: jnp.asarray(v, jnp.float32) for k, v in weights.items()}
    shapes = {k: v.shape for k, v in tree.leaves(abstract).items()}
    assert {k: v.shape for k, v in arrays.items()} == shapes
    return np.asarray(jax.jit(lambda model, tokens: model(tokens))(tree.rebuild(abstract, arrays), tokens))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_the_reference_implementation(name):
    weights, arrays = read(name)
    logits = logits_of(CONFIGS[name], our_weights(CONFIGS[name], weights), arrays["tokens"])
    # Float32 on both sides: sums of at most 64 terms, 2 to 4 layers and angles up to 47 differ by rounding.
    np.testing.assert_allclose(logits, arrays["logits"], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("index", "window"), [(0, 8), (1, None)])
def test_attention_with_sinks_equals_the_reference_implementation(index, window):
    weights, arrays = read("gpt_oss_attention")
    own = {f"self_attn.{k[:-2]}": v for k, v in weights.items() if k.endswith(f".{index}")}
    config = attention(window=window, qkv_bias=True, output_bias=True, sinks=True)
    abstract = tree.abstract(lambda: config.build(jax.random.key(0), 16, 1.0))
    layer = tree.rebuild(abstract, {k: jnp.asarray(v) for k, v in grouped_attention(own, config).items()})
    positions = jnp.broadcast_to(jnp.arange(48, dtype=jnp.int32), (2, 48))
    tables = {(PLAIN, 8): PLAIN.table(positions, 8)}
    y, _ = layer(jnp.asarray(arrays["x"]), tables, Context(positions, None))
    np.testing.assert_allclose(y, arrays[f"y.{index}"], rtol=TOLERANCE, atol=TOLERANCE)


def swap(config, kind: type, **fields):
    """The tree of configs with some fields of every config of one kind changed."""
    if isinstance(config, tuple):
        return tuple(swap(item, kind, **fields) for item in config)
    if not dataclasses.is_dataclass(config):
        return config
    inner = {f.name: swap(getattr(config, f.name), kind, **fields) for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **inner | (fields if isinstance(config, kind) else {}))


@pytest.mark.parametrize(
    ("name", "kind", "fields"),
    [
        ("llama_llama3", RopeConfig, {"scaling": "none"}),
        ("llama_llama3", RopeConfig, {"high_frequency_factor": 4.0}),
        ("llama_linear", RopeConfig, {"scaling": "none"}),
        ("llama_dynamic", RopeConfig, {"scaling": "none"}),
        ("llama_yarn", RopeConfig, {"attention_factor": 1.0}),
        ("llama_yarn", RopeConfig, {"scaling": "linear"}),
        ("gemma2", AttentionConfig, {"window": 9}),
        ("gemma2", AttentionConfig, {"softcap": None}),
        ("gemma2", AttentionConfig, {"scale": None}),
        ("gemma2", FeedForwardConfig, {"activation": "silu"}),
        ("gemma2", RMSNormConfig, {"unit_offset": False}),
        ("gemma2", TransformerConfig, {"embedding_scale": 1.0}),
        ("gemma2", TransformerConfig, {"logit_softcap": None}),
        ("mixtral", MoEConfig, {"normalize": False}),
        ("mixtral", MoEConfig, {"experts_per_token": 1}),
        ("deepseek_v3", MoEConfig, {"scoring": "softmax"}),
        ("deepseek_v3", MoEConfig, {"routed_scale": 1.0}),
        ("deepseek_v3", MLAConfig, {"scale": 8**-0.5}),
    ],
)
def test_each_setting_shows_in_the_logits(name, kind, fields):
    weights, arrays = read(name)
    wrong = swap(CONFIGS[name], kind, **fields)
    logits = logits_of(wrong, our_weights(CONFIGS[name], weights), arrays["tokens"])
    assert np.abs(logits - arrays["logits"]).max() > 100 * TOLERANCE


def interleaved(w: np.ndarray) -> np.ndarray:
    return np.stack(np.split(w, 2, -1), -1).reshape(w.shape)


@pytest.mark.parametrize(
    ("name", "weight", "mistake"),
    [
        ("qwen3", "stacks.0.layers.0.attention.q.w", interleaved),
        ("qwen2", "stacks.0.layers.0.attention.k.b", np.zeros_like),
        ("deepseek_v3", "stacks.1.layers.0.feed_forward.balance", np.zeros_like),
        ("gemma2", "stacks.0.layers.1.attention.o.w", np.flipud),
    ],
    ids=["interleaved rotary pairs", "no key offset", "no balancing bias", "layers in another order"],
)
def test_a_planted_mistake_in_the_weights_is_found(name, weight, mistake):
    weights, arrays = read(name)
    ours = our_weights(CONFIGS[name], weights)
    logits = logits_of(CONFIGS[name], ours | {weight: mistake(ours[weight])}, arrays["tokens"])
    assert np.abs(logits - arrays["logits"]).max() > 100 * TOLERANCE
